"""Linears of a 16-bit model on a processor without BF16 units.

`fit` puts them where transformers has torch's own: the same operands, multiplied as FP32 and
rounded to BF16 once (`dpq_core.kernels.products`); attention likewise. On a processor with BF16
units, on accelerators and in models of other types nothing changes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpq_core.kernels import forward_rows, products

_PIECE = 1 << 20  # weights that are widened at a time


def fit(model: Any) -> Any:
    """The same model, its linears and its attention as above. Subclasses of `nn.Linear`, and
    attention that is not torch's own, stay."""
    if products.bf16_units():
        return model
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    from dpq_core.kernels.attention import attend_in_fp32  # transformers: seconds

    return attend_in_fp32(model)


class Linear(nn.Linear):
    """`nn.Linear` whose BF16 products are `linear`'s."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
) -> Tensor:  # [..., out]
    """`torch.nn.functional.linear`, on a CPU without BF16 units as FP32. Gradients as there."""
    if not (widened(x) and weight.dtype == torch.bfloat16):
        return functional.linear(x, weight, bias)
    if forward_rows.fits(x, weight) and not (torch.is_grad_enabled() and weight.requires_grad):
        return forward_rows.forward(x, weight, bias)
    wide, rows = x.float(), max(1, _PIECE // weight.shape[1])
    pieces = [functional.linear(wide, piece.float()) for piece in weight.split(rows)]
    y = torch.cat(pieces, -1)
    return (y if bias is None else y + bias).to(x.dtype)


def widened(x: Tensor) -> bool:
    """Whether what multiplies `x` does it as FP32."""
    return x.is_cpu and x.dtype == torch.bfloat16 and not products.bf16_units()
