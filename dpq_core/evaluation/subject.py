"""What is scored: a model as blocks, streamed from its files or resident, and whether its attention
goes by shared prefixes.

A streamed model reads a block when it is run and drops it; a resident one keeps what it has read.
Nothing else differs. Blocks of a native checkpoint have their quantized linears: `W4A8Linear`, or
the modules of a runtime that serves them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpq_core.checkpoint.native import MANIFEST, QuantizedCheckpoint, by_its_library, load_model
from dpq_core.evaluation.attention import attend_by_packs
from dpq_core.evaluation.sharing import why_not_shared
from dpq_core.layer.linear import MakeLinear, W4A8Linear
from dpq_core.layer.records import QuantizedLinear
from dpq_core.model.blocks import BlockStream
from dpq_core.model.given import reader_of
from dpq_core.model.given_layouts import read_by_codes
from dpq_core.model.proof import InMemory
from dpq_core.model.quantization import quantization_of, reads_fp8
from dpq_core.model.streaming import empty_model

Layers = Mapping[str, Callable[[], QuantizedLinear]]  # by full name


class Subject:
    """A model to be scored.

    Args:
        stream: its blocks. Its attention is replaced where prefixes are shared.
        unshared: of `sharing.why_not_shared`, before the stream took the model apart.
        layers: quantized linears, which take the place of the stream's.
        resident: what was read once stays.
    """

    def __init__(
        self,
        stream: BlockStream,
        unshared: str | None,
        layers: Layers | None = None,
        resident: bool = False,
    ) -> None:
        self.stream, self.unshared, self._layers = stream, unshared, layers or {}
        stream.outside.quantize(self._layers, lambda name: self._layers[name]())
        if resident and stream.kept is None:
            stream.kept = {}
        if self.unshared is None:
            attend_by_packs(stream.model)

    @property
    def quantized(self) -> bool:
        return bool(self._layers)

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """A block with its weights, while this lasts. The next one is read from the disk
        meanwhile."""
        path, kept = self.stream.block_name(index), self.stream.kept
        block = (kept or {}).get(path)
        if block is None:
            own = {n: made() for n, made in self._layers.items() if n.startswith(f"{path}.")}
            block = self.stream.made(index, own)
        if kept is not None:
            kept[path] = block
        elif not self._layers:
            self.stream.read_ahead(index + 1)
        with self.stream.placed(index, block):
            yield


def subject_of(
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    resident: bool = False,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    source: bool = False,
    linear: MakeLinear = W4A8Linear,
) -> Subject:
    """Any checkpoint that `load_model` reads. Those in 16 bits (FP8 with scales is read as such)
    and native ones are streamed; a third party's is loaded as its format says, and stays.

    dtype: that a model in 16 bits is run in instead of its own (FP32: to compare exactly).
    source: as `load_model` has it.
    linear: what a quantized layer of a native checkpoint becomes; its head stays the definition's.

    Raises:
        CheckpointError, ArchitectureError: as `StreamedModel` and `load_model`.
    """
    if not streamable(folder, source):
        return in_memory(load_model(folder, device, trust_remote_code), device)
    model = empty_model(folder, trust_remote_code, dtype)
    layers: Layers = {}
    if (folder / MANIFEST).is_file():
        checkpoint = QuantizedCheckpoint(folder, trust_remote_code)
        layers = {name: _reading(checkpoint, name) for name in checkpoint.shapes}
    unshared = why_not_shared(model)
    stream = BlockStream(model, reader_of(folder), device)
    stream.linear = linear
    return Subject(stream, unshared, layers, resident)


def streamable(folder: Path, source: bool = False) -> bool:
    """Whether a checkpoint's blocks are read one by one."""
    quantization = None if (folder / MANIFEST).is_file() else quantization_of(folder)
    if quantization is None:
        return True
    if read_by_codes(quantization, source):
        return True
    return reads_fp8(quantization) and (source or not by_its_library(folder))


def in_memory(model: Any, device: torch.device | str = "cpu") -> Subject:
    """A model of transformers that has its weights; it is taken apart, and stays."""
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # a small instance of it has nothing quantized
    unshared = why_not_shared(model)
    stream = BlockStream(model.eval(), InMemory({}), device)
    stream.keep_all()
    return Subject(stream, unshared, resident=True)


def _reading(checkpoint: QuantizedCheckpoint, name: str) -> Callable[[], QuantizedLinear]:
    return lambda: checkpoint.layer(name)
