"""Hidden states that are not finite: after which block, and the way out.

FP16 ends at 65,504, and models that were trained in BF16 go beyond it in single channels: the sum
of a residual becomes infinite, the norm after it NaN, and every logit with it.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dpq_core.errors import InputError
from dpq_core.layer.linear import W4A8Linear


class NotFiniteError(InputError):
    """A 16-bit model that overflows, with the block where it does."""


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


def check_overflow(model: Any, tokens: Tensor) -> None:
    """Find out why a forward pass gave a NaN. A quantized model's is its verdict.

    Args:
        tokens: [windows, length] int64, of that pass.

    Raises:
        NotFiniteError: a block of a 16-bit model overflowed.
    """
    if any(isinstance(module, W4A8Linear) for module in model.modules()):
        return
    if block := first_not_finite(model, tokens):
        raise not_finite(block, next(model.parameters()).dtype)


@torch.inference_mode()
def first_not_finite(model: Any, tokens: Tensor) -> str | None:
    """The first block (member of a module list) whose outputs are not finite, by name.

    Args:
        tokens: [windows, length] int64, of a forward pass that gave a NaN.
    """
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if isinstance(states, Tensor) and not torch.isfinite(states).all():
            found.append(name)

    with ExitStack() as hooks:
        for name, module in _blocks(model).items():

            def hook(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                look(name, output)

            hooks.callback(module.register_forward_hook(hook).remove)
        model(input_ids=tokens.to(model.device), use_cache=False)
    return found[0] if found else None


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Members of the outermost module lists."""
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, nn.ModuleList) and not inside:
            blocks |= {f"{name}.{number}": child for number, child in enumerate(module)}
    return blocks
