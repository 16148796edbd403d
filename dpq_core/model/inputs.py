"""What a model is called with, and how far it has come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

# What a model is called with: input_ids [batch, length], and position_ids [batch, length] where
# these are not those of one text a row; with images also pixel_values [patches, …],
# image_grid_thw [images, 3] and mm_token_type_ids [batch, length].
ModelInputs = dict[str, Tensor]

# What windows of a calibration are counted for: Hessians and activations' scales, one of them, or
# neither, those that layers are tried on. `FOR` among inputs, which no model is called with, is its
# place here; without it they are for both.
Purpose = Literal["both", "hessians", "scales", "unseen"]
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
FOR = "for"


@dataclass(frozen=True)
class Call:
    """What a model calls a block with: positional, the hidden states first unless they are named;
    and by name."""

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]

    def of(self, hidden: Tensor) -> "Call":
        """The same with other hidden states."""
        if self.arguments:
            return Call((hidden, *self.arguments[1:]), self.named)
        return Call((), {**self.named, "hidden_states": hidden})


@dataclass
class Batch:
    """Inputs, and their hidden states before the next block: [batch, length, hidden], or
    [patches, vision hidden] inside a vision tower. told: further arguments of the language model,
    which it hands on to its attention. calls: of the language model's blocks by path, where they
    were written down. purpose: of a calibration's."""

    inputs: ModelInputs
    hidden: Tensor
    told: Mapping[str, Any] = field(default_factory=dict)
    calls: Mapping[str, Call] = field(default_factory=dict)
    purpose: Purpose = "both"

    @classmethod
    def of(cls, inputs: ModelInputs, hidden: Tensor) -> "Batch":
        """Without the pixels, of which the blocks need the number only."""
        purpose = purpose_of(inputs)
        inputs = {name: each for name, each in inputs.items() if name != FOR}
        if "pixel_values" in inputs:
            inputs = inputs | {"pixel_values": torch.zeros(len(inputs["pixel_values"]), 1)}
        return cls(inputs, hidden, purpose=purpose)

    def clone(self) -> "Batch":
        """With hidden states of its own."""
        return replace(self, hidden=self.hidden.clone())


def batches_of(windows: Tensor | Sequence[ModelInputs], batch_size: int) -> list[ModelInputs]:
    """Windows of tokens [n, length] in batches; inputs with images are batches already."""
    if isinstance(windows, Tensor):
        return [{"input_ids": batch} for batch in windows.split(batch_size)]
    return list(windows)


def apart(windows: Mapping[Purpose, Tensor], batch_size: int) -> list[ModelInputs]:
    """Windows of tokens [n, length] by what they are for, in batches, in this order."""
    return [
        marked(each, purpose)
        for purpose, own in windows.items()
        for each in batches_of(own, batch_size)
    ]


def purpose_of(inputs: ModelInputs) -> Purpose:
    """What they are for."""
    return _PURPOSES[int(inputs.get(FOR, 0))]


def marked(inputs: ModelInputs, purpose: Purpose) -> ModelInputs:
    """With what they are for."""
    return inputs | {FOR: torch.tensor(_PURPOSES.index(purpose))}
