"""W4A8 (and W4A16, W8A8) linears on Gaudi, by the operators of the vendor's PyTorch image.

**Not tested on hardware**: the tests hold it against a stand-in of the operators' contracts.

    Ŵ8ᵀ = convert_from_uint4(codes, s4, z, E4M3)                        [in, out]
    x8  = cast_to_fp8_v2(clamp(x / sx), None, …, E4M3)[0]
    y   = fp8_gemm_v2(x8, False, Ŵ8ᵀ, False, None, BF16, sx, s8, None, False) + bias

What the operators take and return, as their callers show it:

- `hpu::convert_from_uint4(codes, scales, zeros, type)`: codes [in, out / 8] int32 and zeros
  [in / g, out / 8] int32, eight along `out`, lowest bits first; scales [in / g, out] bf16. Returns
  type(scales · (codes − zeros)) [in, out]: `HPUWeightOnlyLinear`'s `pack` and `forward` in Intel
  Neural Compressor (`torch/algorithms/weight_only/modules.py`), with E4M3
  `HPUMixedPrecisionLinear` (`torch/algorithms/mixed_low_precision/modules.py`).
- `hpu::cast_to_fp8_v2(x, scale or None, stochastic, with_amax, type)`: type(x · scale), amax.
- `hpu::fp8_gemm_v2(A, transpose_A, B, transpose_B, D, type, scale_A, scale_B, bias, accumulate)`:
  the product times a scalar or [tokens, 1], and a scalar or [out]: `apply_fp8_linear_hpu` in
  vLLM's extension for Gaudi (`vllm_hpu_extension/ops.py`).

Inputs are divided by sx here, as the definition divides; the operator would multiply by 1 / sx.
Gaudi 2 ends at 240. Nothing says where its conversion saturates: a weight with a code beyond
`fp8_max` is refused, and inputs are clamped first.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from dpq_core.arithmetic.packing import pack_codes
from dpq_core.errors import InputError
from dpq_core.layer.input_scale import token_scale
from dpq_core.layer.records import QuantizedLinear, QuantizedWeight, RoundedWeight
from dpq_core.serving.runtimes import other_arithmetic

_PACKED = 8  # codes an int32


def unavailable() -> str:
    """Why the operators cannot run here, or nothing."""
    if importlib.util.find_spec("habana_frameworks") is None:
        return "habana_frameworks is not installed: use the vendor's PyTorch image"
    importlib.import_module("habana_frameworks.torch")
    return "" if _hpu().is_available() else "torch finds no Gaudi device"


def refusal(layer: QuantizedLinear) -> str:
    """Why the operators do not compute a layer, or nothing."""
    scheme, weight = layer.scheme, layer.weight
    if reason := other_arithmetic(layer, "operator"):
        return reason
    if scheme.inner == "e4m3" and scheme.fp8_max > 240 and _is_gaudi2():
        return f"fp8_max is {scheme.fp8_max}, and Gaudi 2 ends at 240: set fp8_max: 240"
    if isinstance(weight, QuantizedWeight):
        return _refused_shape(weight)
    return ""


def _refused_shape(weight: QuantizedWeight) -> str:
    (rows, features), size = weight.codes.shape, weight.grid.group_size
    if rows % _PACKED:
        return f"{rows} output rows: the operator takes multiples of {_PACKED}"
    if features % size:
        return f"{features} columns are no multiple of group_size {size}"
    if weight.grid.saturates():
        return "a code lies beyond fp8_max, where the operator may not saturate"
    return ""


def make(layer: QuantizedLinear, bias: Tensor | None) -> nn.Module:
    """The layer's module.

    Raises:
        InputError: what `refusal` says.
    """
    if reason := refusal(layer):
        raise InputError(f"the gaudi runtime has no operator for this layer: {reason}")
    return GaudiLinear(layer, bias)


class GaudiLinear(nn.Module):
    """A linear of 4-bit codes (two kinds of arithmetic), or of E4M3 weights."""

    weight8: Tensor | None  # [in, out] e4m3, where the weight is stored in 8 bits
    codes: Tensor | None  # [in, out / 8] int32
    group_scale: Tensor | None  # [in / g, out] bf16
    zero_point: Tensor | None  # [in / g, out / 8] int32
    channel_scale: Tensor  # [out] fp32
    input_scale: Tensor | None  # fp32 scalar
    bias: Tensor | None  # [out]

    def __init__(self, layer: QuantizedLinear, bias: Tensor | None) -> None:
        super().__init__()
        weight = layer.weight
        tensors: dict[str, Tensor | None] = dict.fromkeys(
            ("weight8", "codes", "group_scale", "zero_point")
        )
        if isinstance(weight, QuantizedWeight):
            self.out_features, self.in_features = weight.codes.shape
            tensors["codes"] = pack_codes(weight.codes.T)
            tensors["group_scale"] = weight.grid.group_scale.T.contiguous()
            tensors["zero_point"] = pack_codes(weight.grid.zero_point.T)
            channel_scale = weight.grid.channel_scale
        else:
            assert isinstance(weight, RoundedWeight)
            self.out_features, self.in_features = weight.values.shape
            tensors["weight8"] = weight.values.T.contiguous()
            channel_scale = weight.channel_scale
        tensors |= {
            "channel_scale": channel_scale.flatten(),
            "input_scale": layer.input_scale,
            "bias": bias,
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.inner = layer.scheme.inner_format

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] bf16 → [..., out] bf16."""
        rows = x.reshape(-1, self.in_features)
        if self.inner is None:
            y = nn.functional.linear(rows, self._decoded(x.dtype).T, self.bias)
        else:
            y = self._product8(rows, self.inner.maximum)
        return y.view(*x.shape[:-1], self.out_features)

    def _product8(self, x: Tensor, maximum: float) -> Tensor:
        scale = token_scale(x, maximum) if self.input_scale is None else self.input_scale
        ratio = (x.float() / scale).clamp(-maximum, maximum)
        x8, _ = torch.ops.hpu.cast_to_fp8_v2(ratio, None, False, False, torch.float8_e4m3fn)
        weight8 = self._decoded(torch.float8_e4m3fn) if self.weight8 is None else self.weight8
        kind = x.dtype if self.bias is None else torch.float32  # so that it is rounded once
        y: Tensor = torch.ops.hpu.fp8_gemm_v2(
            x8, False, weight8, False, None, kind, scale, self.channel_scale, None, False
        )
        return y if self.bias is None else (y + self.bias).to(x.dtype)

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = torch.ops.hpu.convert_from_uint4(
            self.codes, self.group_scale, self.zero_point, dtype
        )
        return weight

    def extra_repr(self) -> str:
        inner = self.inner.name if self.inner else "16 bit"
        return f"{self.in_features}, {self.out_features}, {inner}"


def _hpu() -> Any:
    """Torch's module for Gaudi, which `habana_frameworks` puts there."""
    return getattr(torch, "hpu", None)


def _is_gaudi2() -> bool:
    return bool(_hpu() and _hpu().is_available() and "GAUDI2" in _hpu().get_device_name().upper())
