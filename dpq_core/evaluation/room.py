"""How much of a model and of its tokens a worker has in hand, and the bytes of it.

A pass over the blocks reads the model once for the tokens in hand. Their hidden states may take a
quarter of the model's bytes: 4 · hidden · 2 bytes are read a token then, against 2 · weights
operations, a tenth of the time on any machine (`docs/scale.md`). A model of up to `RESIDENT` bytes
stays, and its chunks go one by one.
"""

from collections.abc import Container
from dataclasses import dataclass
from math import prod

from dpq_core.evaluation.forest import CHUNK
from dpq_core.evaluation.grain import ACCELERATOR, CPU, Grain
from dpq_core.model.blocks import BlockStream

RESIDENT = 1 << 30  # bytes
_PASSES = 4  # arrays of a pack's widest product that are alive at a time
_FLOAT32, _SIXTEEN, _PLACE = 4, 2, 8
_CODES = 1.5  # bytes of a weight: four bits as they are stored, and a byte
# Kernels that oneDNN keeps, 1,024 of them, one a shape: about 0.45 GB; and lm-evaluation-harness.
_PROCESS = 550 << 20


@dataclass(frozen=True)
class Sizes:
    """Of a model, in weights: all, the largest block, the embedding or the head. hidden: of a
    token. widest: outputs of a linear. codes: bytes that a quantized head or embedding takes more
    while it is decoded."""

    weights: int
    block: int
    embedding: int
    hidden: int
    widest: int
    codes: int = 0

    @classmethod
    def of(cls, stream: BlockStream, quantized: Container[str] = ()) -> "Sizes":
        """From shapes alone. quantized: names of layers, head and embedding perhaps among them."""
        sizes = {name: prod(shape) for name, shape in stream.parameters.items()}
        paths = [stream.block_name(index) for index in range(stream.block_count)]
        blocks = [_under(path, sizes) for path in paths]
        rows, hidden = stream.parameters[f"{stream.anatomy.parts.embedding}.weight"]
        outputs = (shape[0] for shape in stream.parameters.values() if len(shape) == 2)
        parts, weight_of = stream.anatomy.parts, stream.outside.weight_of
        some = any(weight_of(path) in quantized for path in (parts.embedding, parts.head))
        codes = int(_CODES * rows * hidden) if some else 0
        return cls(sum(sizes.values()), max(blocks), rows * hidden, hidden, max(outputs), codes)

    @property
    def resident(self) -> bool:
        """Whether a worker keeps all of the model."""
        return _SIXTEEN * self.weights <= RESIDENT

    def tokens_in_hand(self, available: int) -> int:
        """Tokens that go through the blocks together. available: bytes that a worker may have for
        their hidden states."""
        allowed = min(self.weights * _SIXTEEN // 4, available)
        return CHUNK if self.resident else max(CHUNK, allowed // (self.hidden * _SIXTEEN))

    def kept(self, tokens: int) -> int:
        """Bytes of disk that the last hidden states of so many tokens take, each with its place."""
        return tokens * (self.hidden * _SIXTEEN + _PLACE)

    def bytes_of(self, tokens: int, grain: Grain = CPU) -> int:
        """Bytes of a worker that has so many tokens in hand, above its process."""
        held = self.weights if self.resident else self.block + self.embedding
        pack = grain.pack * max(self.widest, 4 * self.hidden) * _FLOAT32 * _PASSES
        tiles = grain.tile * _FLOAT32 * _PASSES
        states = 2 * tokens * self.hidden * _SIXTEEN  # as they go, and those that predict
        return held * _SIXTEEN + pack + tiles + states + self.codes


@dataclass(frozen=True)
class Room:
    """What evaluating takes above a process that has imported everything, bytes. own: of each
    worker. device: of each worker's, where that has memory of its own; else 0."""

    own: int
    device: int

    @property
    def worker(self) -> int:
        """Bytes of a worker process."""
        return _PROCESS + self.own

    @classmethod
    def of(cls, sizes: Sizes, available: int, on_device: bool) -> "Room":
        """available: as `Sizes.tokens_in_hand` has it."""
        tokens = sizes.tokens_in_hand(available)
        grain = ACCELERATOR if on_device else CPU
        whole, computing = sizes.bytes_of(tokens, grain), sizes.bytes_of(0, grain)
        if on_device:
            return cls(whole - computing + sizes.block * _SIXTEEN, computing)
        return cls(whole, 0)

    def together(self, workers: int) -> int:
        """Bytes of so many workers in one process."""
        return _PROCESS + workers * self.own


def _under(path: str, sizes: dict[str, int]) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(f"{path}."))
