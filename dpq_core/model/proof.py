"""The proof, before any work, that a model run block by block is the model.

A small random instance (`dpq_core.model.small`) is run by transformers as a whole, its experts
fused as transformers keeps them, and streamed as a checkpoint is. The logits must be equal, to the
last bit; so whatever an architecture does around and between its blocks is in the proof: windows
that slide, kinds of attention and rotary settings a layer, scaled embeddings, soft caps, norms.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpq_core.kernels import products
from dpq_core.model.anatomy import ArchitectureError, parts_of
from dpq_core.model.blocks import BlockStream
from dpq_core.model.experts import fused
from dpq_core.model.families import family_of
from dpq_core.model.observation import anatomy_of, fill, identity, small_of
from dpq_core.model.small import random_tensors, tokens


class InMemory:
    """Tensors by name, as a `BlockStream` reads them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.folder = Path("small instance")
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in names}

    def under(self, prefix: str) -> list[str]:
        return [name for name in self._tensors if name.startswith(f"{prefix}.")]

    def read_ahead(self, names: Iterable[str]) -> None:
        """They are at hand."""


def prove(model: Any) -> None:
    """Prove what `anatomy_of` finds of a model; about a second, once for a class and configuration.

    Raises:
        ArchitectureError: what stands in the way, or that the streamed forward differs.
    """
    anatomy_of(model)
    if (key := identity(model)) in _PROVEN:
        return
    small = small_of(model, parts_of(model))
    tensors = random_tensors(small)
    with torch.no_grad(), products.by_libraries():
        expected = _whole(model, tensors)
        found = _streamed(small, tensors)
    if not torch.isfinite(expected).all() or not torch.equal(found, expected):
        apart = float((found.float() - expected.float()).abs().max())
        raise ArchitectureError.of(
            model,
            f"run block by block, a small instance gives logits that differ from the whole model's"
            f" by up to {apart:.3g}, so its blocks share more than hidden states",
        )
    _PROVEN.add(key)


_PROVEN: set[str] = set()


def _whole(model: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """Logits of transformers' own model."""
    whole = small_of(model, parts_of(model), separate=False)
    given, row = dict(tensors), family_of(model.config.model_type).experts
    for name in whole.state_dict():
        path, _, member = name.rpartition(".")
        if member == "gate_up_proj" and name not in tensors:
            given |= fused(tensors, path, row)
    fill(whole, given)
    logits: Tensor = whole(input_ids=tokens()).logits
    return logits


def _streamed(small: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    stream = BlockStream(small, InMemory(tensors))
    batches = stream.begin([{"input_ids": tokens()}])
    for index in range(stream.block_count):
        with stream.block(index):
            stream.advance(batches)
    return stream.logits(batches[0].hidden)
