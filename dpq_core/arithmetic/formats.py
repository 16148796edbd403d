"""Rounding to the rows of `dpq_core.number_formats`.

`round_to` returns FP32 values on the format's grid: nearest, ties to even, saturating at the
format's limits. The two E4M3 rows share the grid of `torch.float8_e4m3fn` (OCP "E4M3": 4 exponent
bits, bias 7, 3 mantissa bits, subnormals down to 2**-9, no infinities); they differ in where they
saturate: 448 is the format's own maximum (Hopper, Gaudi 3), 240 is Gaudi 2's.
"""

import torch
from torch import Tensor

from dpq_core.number_formats import FORMATS, NumberFormat

__all__ = ["FORMATS", "NumberFormat", "quantize", "round_to"]


def round_to(values: Tensor, fmt: NumberFormat) -> Tensor:
    """Nearest value of `fmt`, ties to even, saturating. Any shape, any float dtype; FP32 out.

    NaN stays NaN: a caller that must not see one checks for it.
    """
    clamped = values.float().clamp(fmt.minimum, fmt.maximum)
    if not fmt.is_float:
        return clamped.round()
    encoded = clamped.to(torch.float8_e4m3fn)
    if clamped.is_cpu and clamped.numel() >= _MANY and not clamped.sum().isnan():
        return _decode(encoded)
    return encoded.float()


def _decode(encoded: Tensor) -> Tensor:
    """`float8_e4m3fn` without NaN → FP32, exactly.

    Torch's own conversion is scalar on a CPU. Here sign, exponent and mantissa move to their places
    in FP32, and a factor of 2**120 makes up for the exponents' biases (7 and 127).
    """
    bits = (encoded.view(torch.int8).to(torch.int32) << 20) & _FP32_PLACES
    return bits.view(torch.float32).mul_(2.0**120)


_MANY = 1 << 15
_FP32_PLACES = -(1 << 31) | 0x7F << 20  # sign, and seven bits of exponent and mantissa


def quantize(values: Tensor, scale: Tensor, fmt: NumberFormat) -> Tensor:
    """`round_to(values / scale)`: the values in units of `scale`, which broadcasts. FP32."""
    return round_to(values.float() / scale, fmt)
