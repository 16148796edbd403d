"""A quantized linear layer: its tensors in storage, and its arithmetic as a module.

    y = s8 * sx * (x8 · Ŵ8ᵀ) + bias        x8 = round(x / sx), FP32 sums, output in x's type

Products of two E4M3 (or INT8) values are exact in FP32, so an FP32 product of the rounded operands
has exactly the arithmetic of the 8-bit units, on any device. This module is the reference that the
fast runtimes are held against.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from dpq_core.formats import round_to
from dpq_core.grid import SYMMETRIC_ZERO_POINT, Grid
from dpq_core.packing import pack_codes, pack_zero_points, unpack_codes, unpack_zero_points
from dpq_core.quantize import LayerReport, QuantizedLinear, QuantizedWeight
from dpq_core.scheme import Scheme

_STORED_REPORT = LayerReport(error=float("nan"), damp_frac=float("nan"), codes_moved=0)


def layer_tensors(layer: QuantizedLinear, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors that a checkpoint stores for a layer, by the name that follows the layer's."""
    tensors: dict[str, Tensor] = {}
    if isinstance(layer.weight, QuantizedWeight):
        grid = layer.weight.grid
        tensors["weight_packed"] = pack_codes(layer.weight.codes)
        tensors["group_scale"] = grid.group_scale
        if not scheme.symmetric:
            tensors["zero_point"] = pack_zero_points(grid.zero_point)
        if grid.inner is not None:
            tensors["channel_scale"] = grid.channel_scale
    else:
        tensors["weight"] = layer.weight
    if layer.input_scale is not None:
        tensors["input_scale"] = layer.input_scale
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def expected_shapes(rows: int, features: int, scheme: Scheme) -> dict[str, tuple[list[int], str]]:
    """Shape and safetensors type of each tensor of a stored layer [rows, features]."""
    groups = -(-features // scheme.group_size)
    shapes: dict[str, tuple[list[int], str]] = {}
    if scheme.method == "none":
        shapes["weight"] = ([rows, features], "BF16")
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


def layer_from_tensors(
    tensors: Mapping[str, Tensor], features: int, scheme: Scheme
) -> QuantizedLinear:
    """Inverse of `layer_tensors`; the report is not stored with the tensors.

    Raises:
        KeyError: a tensor is missing. ValueError: a shape does not fit.
    """
    input_scale = tensors["input_scale"] if scheme.activations == "static" else None
    if scheme.method == "none":
        return QuantizedLinear(tensors["weight"], input_scale, _STORED_REPORT)
    group_scale = tensors["group_scale"]
    if scheme.symmetric:
        zero_point = torch.full_like(group_scale, SYMMETRIC_ZERO_POINT, dtype=torch.uint8)
    else:
        zero_point = unpack_zero_points(tensors["zero_point"], group_scale.shape[1])
    inner = scheme.inner_format
    ones = torch.ones(len(group_scale), 1, device=group_scale.device)
    grid = Grid(
        channel_scale=ones if inner is None else tensors["channel_scale"],
        group_scale=group_scale,
        zero_point=zero_point,
        group_size=scheme.group_size,
        inner=inner,
    )
    codes = unpack_codes(tensors["weight_packed"], features)
    return QuantizedLinear(QuantizedWeight(codes, grid), input_scale, _STORED_REPORT)


class W4A8Linear(nn.Module):
    """Drop-in for `nn.Linear` that computes with a quantized layer (fake quantization).

    Holds Ŵ8 decoded, in BF16, which represents every E4M3 and INT8 value exactly.
    """

    weight8: Tensor  # [out, in] bf16: Ŵ8, or the 16-bit weight where nothing is rounded to 8 bits
    channel_scale: Tensor  # [out] fp32
    input_scale: Tensor | None  # fp32 scalar
    bias: Tensor | None  # [out]

    def __init__(self, layer: QuantizedLinear, bias: Tensor | None, scheme: Scheme) -> None:
        super().__init__()
        if isinstance(layer.weight, QuantizedWeight):
            weight8 = layer.weight.grid.decode8(layer.weight.codes).to(torch.bfloat16)
            channel_scale = layer.weight.grid.channel_scale.flatten()
        else:
            weight8 = layer.weight
            channel_scale = torch.ones(len(weight8), device=weight8.device)
        self.out_features, self.in_features = weight8.shape
        self.activations = scheme.activations
        self.inner = scheme.inner_format
        self.register_buffer("weight8", weight8)
        self.register_buffer("channel_scale", channel_scale)
        self.register_buffer("input_scale", layer.input_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out] in x's type."""
        if self.inner is None:  # 16-bit arithmetic: an ordinary linear
            return nn.functional.linear(x, self.weight8.to(x.dtype), self.bias)
        x8, input_scale = self._quantize_input(x.float())
        exact = self.activations != "none" or x.dtype == torch.bfloat16
        with _bf16_units() if _alone and exact else nullcontext():
            y = nn.functional.linear(x8, self.weight8.float())
        y = y * self.channel_scale * input_scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def _quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x8 and the scale that brings it back: a scalar, or one a token [..., 1]."""
        assert self.inner is not None
        if self.activations == "none":
            return x, x.new_ones(())
        scale = self.input_scale
        if scale is None:
            scale = token_scale(x, self.inner.maximum)
        return round_to(x / scale, self.inner), scale

    def extra_repr(self) -> str:
        inner = self.inner.name if self.inner else "16 bit"
        return f"{self.in_features}, {self.out_features}, {inner}, {self.activations} activations"


_alone = False


@contextmanager
def alone_in_process() -> Iterator[None]:
    """Promise that no other thread multiplies FP32 matrices: lets a CPU's BF16 units do the work.

    Operands that BF16 represents give the same exact products there, summed in FP32 as well, three
    times as fast. oneDNN only takes the choice for the whole process, hence the promise.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def _bf16_units() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def token_scale(x: Tensor, maximum: float) -> Tensor:
    """Dynamic scale of each token: its largest magnitude meets `maximum`. [..., in] → [..., 1]."""
    amax = x.abs().amax(-1, keepdim=True)
    return torch.where(amax > 0, amax / maximum, torch.ones_like(amax))
