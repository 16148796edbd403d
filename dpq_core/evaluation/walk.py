"""A chunk on its way through the blocks: its batches, and how they are made of its trees.

In packs a tree runs as it is. By rows, each sequence is run from its root, beside others of about
its length: for architectures whose attention takes no tree.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpq_core.evaluation.attention import Carried, Forest
from dpq_core.evaluation.forest import Chunk, sequences_of
from dpq_core.evaluation.grain import Grain, grain_on
from dpq_core.evaluation.packs import Pack, packs_of
from dpq_core.evaluation.spans import Span, spans_of
from dpq_core.model.blocks import BlockStream
from dpq_core.model.finite import all_finite
from dpq_core.model.inputs import Batch, ModelInputs


@dataclass
class Walk:
    """places: the chunk's tokens that a batch's are, [batch, length]; −1: none. packs: of each
    batch, where there are any, with its spans, where it goes by them."""

    stream: BlockStream
    chunk: Chunk
    inputs: list[ModelInputs]
    places: list[Tensor]
    packs: list[tuple[Pack, list[Span]]] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    @property
    def computed(self) -> int:
        """Tokens that run through each block, those that fill up rows included."""
        return sum(each["input_ids"].numel() for each in self.inputs)

    def begin(self, begun: Callable[[ModelInputs], Batch]) -> None:
        """Before the first block; `begun` of `BlockStream.embedding`. Hidden states are on the
        device of a model that stays, and in the host's memory beside one that streams."""
        self.batches = [begun(inputs) for inputs in self.inputs]
        if self.stream.kept is not None:
            for batch in self.batches:
                batch.hidden = batch.hidden.to(self.stream.device)

    def advance(self) -> None:
        """Through the block that is loaded now."""
        carried = Carried()
        for number, batch in enumerate(self.batches):
            if self.packs:
                batch.told = {"forest": Forest(*self.packs[number], carried)}
            batch.hidden = self.stream.forward(batch)

    @property
    def finite(self) -> bool:
        """Whether all hidden states are."""
        return all(all_finite(batch.hidden) for batch in self.batches)

    def states(self) -> Tensor:
        """[tokens, hidden] of the chunk's tokens."""
        width = self.batches[0].hidden.shape[-1]
        found = self.batches[0].hidden.new_empty(len(self.chunk), width)
        for batch, places in zip(self.batches, self.places, strict=True):
            used = places >= 0
            found[places[used]] = batch.hidden[used]
        return found


def packs_walk(stream: BlockStream, chunk: Chunk, grain: Grain | None = None) -> Walk:
    """Packs [1, tokens] of this grain, or of what suits the model's device."""
    grain, device = grain or grain_on(stream.device), stream.device
    packs = packs_of(chunk, grain.pack)
    spans = spans_of(chunk, packs, grain.span, device) if grain.span else [[] for _ in packs]
    places = [torch.arange(pack.start, pack.stop)[None] for pack in packs]
    inputs = [{"input_ids": chunk.ids[p], "position_ids": chunk.positions[p]} for p in places]
    return Walk(stream, chunk, inputs, places, list(zip(packs, spans, strict=True)))


def rows_walk(stream: BlockStream, chunk: Chunk) -> Walk:
    """Rows [sequences, length], the longest first, filled up on the right: no token sees what
    follows it."""
    tokens = grain_on(stream.device).pack
    places, batch = list[Tensor](), list[Tensor]()
    for sequence in sorted(map(torch.tensor, sequences_of(chunk)), key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > tokens:
            places.append(_filled(batch))
            batch = []
        batch.append(sequence)
    places.append(_filled(batch))
    inputs = [{"input_ids": chunk.ids[p.clamp(min=0)]} for p in places]
    return Walk(stream, chunk, inputs, places)


def _filled(sequences: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-1)
