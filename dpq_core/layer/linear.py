"""A quantized linear layer: its tensors in storage, and its arithmetic as a module.

    y = s8 * sx * (x8 · Ŵ8ᵀ) + bias        x8 = round(x / sx), FP32 sums, output in x's type

Products of two E4M3 (or INT8) values are exact in FP32, so an FP32 product of the rounded operands
has exactly the arithmetic of the 8-bit units, on any device. This module is the reference that the
fast runtimes are held against.

`W4A8Linear` states the formula in plain torch, and that is what runs on accelerators and in FP32
models. BF16 models on a CPU take one pass over their tokens instead,
`dpq_core.kernels.forward_rows`, whose only difference is the order of the sums.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dpq_core.arithmetic.formats import round_to
from dpq_core.arithmetic.packing import (
    pack_codes,
    pack_zero_points,
    unpack_codes,
    unpack_zero_points,
)
from dpq_core.kernels import forward_rows, sixteen_bit
from dpq_core.layer.grid import SYMMETRIC_ZERO_POINT, Grid
from dpq_core.layer.quantize import LayerReport, QuantizedLinear, QuantizedWeight, RoundedWeight
from dpq_core.recipe.scheme import Scheme

_STORED_REPORT = LayerReport(error=float("nan"), damp_frac=float("nan"), codes_moved=0)


def layer_tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors that a checkpoint stores for a layer, by the name that follows the layer's."""
    tensors: dict[str, Tensor] = {}
    if isinstance(layer.weight, RoundedWeight):
        tensors["weight"] = layer.weight.values
        tensors["channel_scale"] = layer.weight.channel_scale
    elif isinstance(layer.weight, QuantizedWeight):
        grid = layer.weight.grid
        tensors["weight_packed"] = pack_codes(layer.weight.codes)
        tensors["group_scale"] = grid.group_scale
        if not layer.scheme.symmetric:
            tensors["zero_point"] = pack_zero_points(grid.zero_point)
        if grid.inner is not None:
            tensors["channel_scale"] = grid.channel_scale
    else:
        tensors["weight"] = layer.weight
    if layer.input_scale is not None:
        tensors["input_scale"] = layer.input_scale
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def expected_shapes(rows: int, features: int, scheme: Scheme) -> dict[str, tuple[list[int], str]]:
    """Shape and safetensors type of each tensor of a stored layer [rows, features]. A weight that
    is kept is BF16 here, and F16 in models that run in it."""
    groups = -(-features // scheme.group_size)
    shapes: dict[str, tuple[list[int], str]] = {}
    if scheme.method == "none":
        shapes["weight"] = ([rows, features], "BF16")
    elif scheme.bits == 8:
        is_float = scheme.inner_format is not None and scheme.inner_format.is_float
        shapes["weight"] = ([rows, features], "F8_E4M3" if is_float else "I8")
        shapes["channel_scale"] = ([rows, 1], "F32")
    else:
        shapes["weight_packed"] = ([rows, -(-features // 8)], "I32")
        shapes["group_scale"] = ([rows, groups], "BF16")
        if not scheme.symmetric:
            shapes["zero_point"] = ([rows, -(-groups // 2)], "U8")
        if scheme.inner_format is not None:
            shapes["channel_scale"] = ([rows, 1], "F32")
    if scheme.activations == "static":
        shapes["input_scale"] = ([], "F32")
    return shapes


def stored_bytes(rows: int, features: int, scheme: Scheme) -> int:
    """Size of a stored layer: codes, scales and zero points."""
    shapes = expected_shapes(rows, features, scheme).values()
    return sum(math.prod(shape) * _TYPE_BYTES[dtype] for shape, dtype in shapes)


_TYPE_BYTES = {"I32": 4, "F32": 4, "BF16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1}


def layer_from_tensors(
    tensors: Mapping[str, Tensor], features: int, scheme: Scheme
) -> QuantizedLinear:
    """Inverse of `layer_tensors`; the report is not stored with the tensors.

    Raises:
        KeyError: a tensor is missing. ValueError: a shape does not fit.
    """
    input_scale = tensors["input_scale"] if scheme.activations == "static" else None
    if scheme.method == "none":
        return QuantizedLinear(scheme, tensors["weight"], input_scale, _STORED_REPORT)
    if scheme.bits == 8:
        rounded = RoundedWeight(tensors["weight"], tensors["channel_scale"])
        return QuantizedLinear(scheme, rounded, input_scale, _STORED_REPORT)
    group_scale = tensors["group_scale"]
    if scheme.symmetric:
        zero_point = torch.full_like(group_scale, SYMMETRIC_ZERO_POINT, dtype=torch.uint8)
    else:
        zero_point = unpack_zero_points(tensors["zero_point"], group_scale.shape[1])
    inner = scheme.inner_format
    ones = torch.ones(len(group_scale), 1, dtype=torch.float32, device=group_scale.device)
    grid = Grid(
        channel_scale=ones if inner is None else tensors["channel_scale"],
        group_scale=group_scale,
        zero_point=zero_point,
        group_size=scheme.group_size,
        inner=inner,
    )
    codes = unpack_codes(tensors["weight_packed"], features)
    return QuantizedLinear(scheme, QuantizedWeight(codes, grid), input_scale, _STORED_REPORT)


class W4A8Linear(nn.Module):
    """Drop-in for `nn.Linear` that computes with a quantized layer (fake quantization).

    Holds Ŵ8 decoded, in BF16, which represents every E4M3 and INT8 value exactly.
    """

    weight8: Tensor  # [out, in] bf16: Ŵ8, or the 16-bit weight where nothing is rounded to 8 bits
    channel_scale: Tensor  # [out] fp32
    input_scale: Tensor | None  # fp32 scalar
    bias: Tensor | None  # [out]

    def __init__(self, layer: QuantizedLinear, bias: Tensor | None) -> None:
        super().__init__()
        if isinstance(layer.weight, QuantizedWeight):
            weight8 = layer.weight.grid.decode8(layer.weight.codes).to(torch.bfloat16)
            channel_scale = layer.weight.grid.channel_scale.flatten()
        elif isinstance(layer.weight, RoundedWeight):
            weight8 = layer.weight.values.to(torch.bfloat16)
            channel_scale = layer.weight.channel_scale.flatten()
        else:
            weight8 = layer.weight
            channel_scale = torch.ones(len(weight8), dtype=torch.float32, device=weight8.device)
        self.out_features, self.in_features = weight8.shape
        self.activations = layer.scheme.activations
        self.inner = layer.scheme.inner_format
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
        y = self._sums(x8) * self.channel_scale
        if scale is not None:
            y = y * scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def _sums(self, x8: Tensor) -> Tensor:
        """x8 · Ŵ8ᵀ in FP32, of x8 [..., in] fp32. BF16 holds both where x8 is of 8 bits: tensor
        cores multiply them, exactly."""
        exact = x8.is_cuda and self.activations != "none" and self.weight8.dtype == torch.bfloat16
        if not exact or x8.requires_grad:
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


def token_scale(x: Tensor, maximum: float) -> Tensor:
    """Dynamic scale of each token, FP32: its largest magnitude meets `maximum`.

    [..., in] → [..., 1].
    """
    amax = x.abs().amax(-1, keepdim=True).float()
    limit = torch.full_like(amax, maximum)  # by a plain number CUDA multiplies by its reciprocal
    return torch.where(amax > 0, amax / limit, torch.ones_like(amax))
