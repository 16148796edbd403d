"""Hidden states that are not finite: after which block, and the way out.

FP16 ends at 65,504, and models that were trained in BF16 go beyond it in single channels: the sum
of a residual becomes infinite, the norm after it NaN, and every logit with it.
"""

import torch
from torch import Tensor

from dpq_core.errors import InputError


class NotFiniteError(InputError):
    """A 16-bit model that overflows, with the block where it does."""


def all_finite(states: Tensor) -> bool:
    """Whether all elements are. What is not makes the sum so too, which takes a fortieth of the
    time of looking at each; a sum may overflow without."""
    return bool(states.sum().isfinite()) or bool(states.isfinite().all())


def not_finite(block: str, dtype: torch.dtype) -> NotFiniteError:
    """The error for a block's hidden states. dtype: that the model runs in."""
    return NotFiniteError(
        f"{block}: the {_name(dtype)} model's hidden states are not finite after it: {_way(dtype)}"
    )


def inputs_not_finite(linear: str, dtype: torch.dtype) -> NotFiniteError:
    """The error for what a linear is given inside a block."""
    return NotFiniteError(
        f"{linear}: what the {_name(dtype)} model gives it is not finite: {_way(dtype)}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _way(dtype: torch.dtype) -> str:
    if dtype != torch.float16:
        return "look at the texts, then at the checkpoint: its weights may be damaged"
    return (
        'float16 ends at 65504: write "dtype": "bfloat16" into config.json of a copy of the'
        " model, which then runs in BF16"
    )
