"""A quantized linear layer: its tensors in storage, and its arithmetic as a module.

    y = s8 * sx * (x8 · Ŵ8ᵀ) + bias        x8 = round(x / sx), FP32 sums, output in x's type

Products of two E4M3 (or INT8) values are exact in FP32, so an FP32 product of the rounded operands
has exactly the arithmetic of the 8-bit units, on any device. This module is the reference that the
fast runtimes are held against.

`W4A8Linear` states the formula in plain torch, and that is what runs on accelerators and in FP32
models. BF16 models on a CPU take one pass over their tokens instead,
`dpq_core.kernels.forward_rows`, whose only difference is the order of the sums.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpq_core.arithmetic.formats import round_to
from dpq_core.kernels import forward_rows, sixteen_bit
from dpq_core.layer.input_scale import token_scale
from dpq_core.layer.records import QuantizedLinear, QuantizedWeight, RoundedWeight

MakeLinear = Callable[[QuantizedLinear, Tensor | None], nn.Module]  # of a layer and its bias

_PIECE = 1 << 22  # weights that are decoded at a time, in FP32: an output head has many


def decoded(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """Ŵ16 [out, in] in a type, without all of it in FP32."""
    return _by_pieces(layer, QuantizedLinear.decoded, dtype)


def _by_pieces(
    layer: QuantizedLinear, of: Callable[[QuantizedLinear], Tensor], dtype: torch.dtype
) -> Tensor:
    every = max(1, _PIECE // layer.features)
    first = of(layer.some(slice(0, every))).to(dtype)
    if len(first) == layer.rows:
        return first
    found = first.new_empty(layer.rows, layer.features)
    found[:every] = first
    for start in range(every, layer.rows, every):
        rows = slice(start, start + every)
        found[rows] = of(layer.some(rows))
    return found


def _decoded8(layer: QuantizedLinear) -> Tensor:
    assert isinstance(layer.weight, QuantizedWeight)
    return layer.weight.grid.decode8(layer.weight.codes)


class W4A8Linear(nn.Module):
    """Drop-in for `nn.Linear` that computes with a quantized layer (fake quantization).

    Holds Ŵ8 decoded, in BF16, which represents every E4M3 and INT8 value exactly. A weight that is
    not rounded (`inner: none`) has up to 12 significant bits, and is multiplied with E4M3 inputs as
    FP32: that is exact, as codes are that are multiplied first and scaled then.
    """

    weight8: Tensor  # [out, in] bf16: Ŵ8, or the 16-bit weight; fp32 where inputs alone are rounded
    channel_scale: Tensor  # [out] fp32
    input_scale: Tensor | None  # fp32 scalar
    bias: Tensor | None  # [out]

    def __init__(self, layer: QuantizedLinear, bias: Tensor | None) -> None:
        super().__init__()
        if isinstance(layer.weight, QuantizedWeight):
            inner = layer.weight.grid.inner or layer.scheme.input_format is None
            weight8 = _by_pieces(layer, _decoded8, torch.bfloat16 if inner else torch.float32)
            channel_scale = layer.weight.grid.channel_scale.flatten()
        elif isinstance(layer.weight, RoundedWeight):
            weight8 = layer.weight.values.to(torch.bfloat16)
            channel_scale = layer.weight.channel_scale.flatten()
        else:
            weight8 = layer.weight
            channel_scale = torch.ones(len(weight8), dtype=torch.float32, device=weight8.device)
        self.out_features, self.in_features = weight8.shape
        self.activations = layer.scheme.activations
        self.inner = layer.scheme.input_format
        self.register_buffer("weight8", weight8)
        self.register_buffer("channel_scale", channel_scale)
        self.register_buffer("input_scale", layer.input_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out] in x's type."""
        if self.inner is None:  # 16-bit arithmetic: an ordinary linear
            return sixteen_bit.linear(x, self.weight8.to(x.dtype), self.bias)
        scale = self._input_scale(x)
        if forward_rows.fits(x, self.weight8):
            to = x, self.weight8, self.bias, self.channel_scale
            return forward_rows.forward(*to, scale, self.inner)
        x8 = x.float() if scale is None else round_to(x.float() / scale, self.inner)
        of_bf16 = self.activations != "none" or x.dtype == torch.bfloat16
        y = self._sums(x8, of_bf16) * self.channel_scale
        if scale is not None:
            y = y * scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def _sums(self, x8: Tensor, of_bf16: bool) -> Tensor:
        """x8 · Ŵ8ᵀ in FP32, of x8 [..., in] fp32. of_bf16: BF16 holds it, being of 8 bits or BF16
        itself: tensor cores multiply both as they are, exactly, and no FP32 copy of Ŵ8 is made."""
        exact = of_bf16 and self.weight8.dtype == torch.bfloat16
        if not (exact and x8.is_cuda) or x8.requires_grad:
            return nn.functional.linear(x8, self.weight8.float())
        rows = x8.reshape(-1, self.in_features).to(torch.bfloat16)
        sums = torch.mm(rows, self.weight8.T, out_dtype=torch.float32)
        return sums.view(*x8.shape[:-1], self.out_features)

    def _input_scale(self, x: Tensor) -> Tensor | None:
        """sx: a scalar, or one a token [..., 1]; None where inputs are not rounded."""
        if self.activations == "none":
            return None
        assert self.inner is not None
        if self.input_scale is not None:
            return self.input_scale
        return token_scale(x, self.inner.maximum)

    def extra_repr(self) -> str:
        inner = self.inner.name if self.inner else "16 bit"
        return f"{self.in_features}, {self.out_features}, {inner}, {self.activations} activations"
