"""Triton's interpreter with the hardware's conversions.

It truncates where a GPU rounds to nearest even (FP32 to BF16), rounds E4M3's ties up without
carrying, does not saturate (PTX: `cvt.rn.satfinite.e4m3x2`), and multiplies the bit patterns of
BF16 numbers. Torch's conversions stand in for its own; `hopper_cases.py` holds them against
`ml_dtypes`.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_own_convert, _own_patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor
_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float8e4nv: torch.float8_e4m3fn,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _convert(data, source, target, rounding):
    if source not in _TORCH or target not in _TORCH:
        return _own_convert(data, source, target, rounding)
    bits = torch.from_numpy(np.ascontiguousarray(data).copy()).view(_BITS[data.itemsize])
    values = bits.view(_TORCH[source])
    if target == tl.float8e4nv:
        values = values.float().clamp(-448, 448)  # NaN stays
    converted = values.to(_TORCH[target])
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[converted.element_size()]
    return converted.view(_BITS[converted.element_size()]).numpy().view(unsigned)


def _dot(self, a, b, sums, input_precision, max_num_imprecise_acc):
    wide = [_convert(x.data, x.dtype.scalar, tl.float32, None).view(np.float32) for x in (a, b)]
    return interpreter.TensorHandle(np.matmul(*wide) + sums.data, sums.dtype.scalar)


def _patch_tensor(tensor, scope):
    """Scalars are arrays of one element, which Triton 3.6 hands to `int` as they are, and NumPy 2.5
    refuses."""
    _own_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def correct():
    """Replace the interpreter's conversions and its product, in this process."""
    interpreter._convert_float = _convert
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.InterpreterBuilder.create_dot = _dot
