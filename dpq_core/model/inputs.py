"""What a model is called with, and how far it has come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# What a model is called with: input_ids [batch, length], and position_ids [batch, length] where
# these are not those of one text a row; with images also pixel_values [patches, …],
# image_grid_thw [images, 3] and mm_token_type_ids [batch, length].
ModelInputs = dict[str, Tensor]


@dataclass
class Batch:
    """Inputs, and their hidden states before the next block: [batch, length, hidden], or
    [patches, vision hidden] inside a vision tower. told: further arguments of the language model,
    which it hands on to its attention."""

    inputs: ModelInputs
    hidden: Tensor
    told: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: ModelInputs, hidden: Tensor) -> "Batch":
        """Without the pixels, of which the blocks need the number only."""
        if "pixel_values" in inputs:
            inputs = inputs | {"pixel_values": torch.zeros(len(inputs["pixel_values"]), 1)}
        return cls(inputs, hidden)

    def clone(self) -> "Batch":
        """With hidden states of its own."""
        return Batch(self.inputs, self.hidden.clone(), self.told)


def batches_of(windows: Tensor | Sequence[ModelInputs], batch_size: int) -> list[ModelInputs]:
    """Windows of tokens [n, length] in batches; inputs with images are batches already."""
    if isinstance(windows, Tensor):
        return [{"input_ids": batch} for batch in windows.split(batch_size)]
    return list(windows)
