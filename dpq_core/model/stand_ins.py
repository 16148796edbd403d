"""What stands where a part of a streamed model is not loaded."""

from typing import Any

import torch
from torch import Tensor, nn


class Skip(nn.Module):
    """Stands where a block is not run: hands the hidden states on, as a block returns them."""

    def __init__(self, tuple_length: int | None = None) -> None:
        super().__init__()
        self._length = tuple_length

    def forward(self, *arguments: Any, **named: Any) -> Any:
        states = arguments[0] if arguments else named["hidden_states"]
        return states if self._length is None else (states, *[None] * (self._length - 1))


class NoEmbedding(nn.Module):
    """Stands for the embedding while a block is run: the shape of what it gives, and zeros."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width, self._dtype = width, dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids.new_zeros((*input_ids.shape, self._width), dtype=self._dtype)
