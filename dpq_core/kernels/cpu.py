"""Inner loops on a CPU: the kernels of `numba_loops` and `distribution_loops`, called with tensors.

They take the place of a definition in plain torch wherever `fits` says so. Memory: what is written
is written in place.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.arithmetic.formats import NumberFormat
from dpq_core.kernels import distribution_loops, numba_loops, products
from dpq_core.kernels.blas import AS_IS, ROW_MAJOR, TRANSPOSED, bf16_product
from dpq_core.kernels.threads import in_ranges

_COLUMNS = 32  # that `numba_loops.choose` takes at a time
_SQUARE = 256  # rows of a Hessian whose products with what follows are made at a time


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: FP32 in main memory."""
    return all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors)


def choose_block(
    work: Tensor,  # [n, out] fp32, contiguous: the working weight, replaced by the errors
    codes: Tensor,  # [n, out] fp32, contiguous, written
    grid: ColumnGrid,  # of the block's columns
    factor: Tensor,  # [n, n] fp32, U's diagonal block
) -> None:
    """`definitions.choose_block`: 32 columns at a time, a product for those that follow."""
    (group, *scales), inner = _arrays(grid), rounding_of(grid.inner)
    transposed = factor.T.contiguous()
    for start in range(0, len(work), _COLUMNS):
        part = slice(start, min(start + _COLUMNS, len(work)))
        taken = transposed[part, part].contiguous().numpy()
        written = work[part].numpy(), codes[part].numpy()
        _by_rows(numba_loops.choose, work.shape[1], *written, taken, group[part], *scales, *inner)
        work[part.stop :].addmm_(transposed[part.stop :, part], work[part], alpha=-1)


def residual(
    codes: Tensor,  # [n, out] fp32, contiguous
    weight: Tensor,  # [n, out] fp32, contiguous, replaced
    grid: ColumnGrid,
) -> Tensor:
    """ŵ - w [n, out], in the place of w."""
    arrays = codes.numpy(), weight.numpy(), *_arrays(grid)
    _by_rows(numba_loops.residual, weight.shape[1], *arrays, *rounding_of(grid.inner))
    return weight


def refine_codes(
    codes: Tensor,  # [n, out] fp32, contiguous, changed
    gradient: Tensor,  # [out, n] fp32, contiguous: d H, kept up to date
    grid: ColumnGrid,
    hessian: Tensor,  # [n, n] fp32, contiguous
    least_gain: float,
    max_passes: int,
) -> int:
    """`gradient_rounding.refine_codes`, from the gradient of these codes. Returns codes moved."""
    arrays = codes.numpy(), gradient.numpy(), hessian.numpy(), hessian.diagonal().numpy().copy()
    limits = np.float32(least_gain), max_passes
    rest = *_arrays(grid), *rounding_of(grid.inner)
    return sum(_by_rows(numba_loops.refine, len(gradient), *arrays, *limits, *rest))


def group_errors(
    weight: Tensor,  # [out, n] fp32, contiguous, in units of s8
    importance: Tensor,  # [n] fp32
    group_size: int,
    group_scale: Tensor,  # [out, G] fp32
    zero_point: Tensor,  # [out, G] fp32
    inner: NumberFormat | None,
) -> Tensor:  # [out, G] fp32
    """`definitions.group_errors`."""
    errors = torch.empty_like(group_scale)
    scales = group_scale.numpy(), zero_point.numpy(), errors.numpy()
    arrays = weight.numpy(), importance.numpy(), group_size, *scales
    _by_rows(numba_loops.group_errors, len(weight), *arrays, *rounding_of(inner))
    return errors


def add_square(
    sums: Tensor,  # [n, n] fp32, contiguous, changed
    x: Tensor,  # [rows, n]
    factor: float,
) -> None:
    """sums += factor · xᵀ x, symmetric: FP32 sums of products that are exact in FP32 where x is of
    BF16. As FP32 every product is made once, and its mirror image copied: by MKL without units for
    BF16 none is saved, and it takes up to 1.6 times as long."""
    x, (rows, n) = x.detach(), x.shape
    if x.dtype == torch.bfloat16 and bf16_product is not None and products.by_mkl():
        x = x.contiguous()
        bf16_product(
            ROW_MAJOR, TRANSPOSED, AS_IS, n, n, rows,
            factor, x.data_ptr(), n, x.data_ptr(), n,
            1.0, sums.data_ptr(), n,
        )  # fmt: skip
        return
    x = x.float()
    for start in range(0, n, _SQUARE):
        part, stop = slice(start, start + _SQUARE), min(start + _SQUARE, n)
        sums[part, start:].addmm_(x[:, part].T, x[:, start:], alpha=factor)
        sums[stop:, part] = sums[part, stop:].T


def add_product(
    sums: Tensor,  # [m, n] fp32, contiguous, changed
    left: Tensor,  # [rows, m]
    right: Tensor,  # [rows, n], of the same type
    factor: float,
) -> None:
    """sums += factor · leftᵀ right: FP32 sums, of products that are exact where both are BF16."""
    (rows, m), n = left.shape, right.shape[1]
    left, right = left.detach().contiguous(), right.detach().contiguous()
    if left.dtype == torch.bfloat16 and bf16_product is not None and products.bf16_units():
        bf16_product(
            ROW_MAJOR, TRANSPOSED, AS_IS, m, n, rows,
            factor, left.data_ptr(), m, right.data_ptr(), n,
            1.0, sums.data_ptr(), n,
        )  # fmt: skip
        return
    sums.addmm_(left.float().T, right.float(), alpha=factor)


def quantize(
    x: Tensor,  # [rows, n] bf16
    scale: Tensor,  # fp32: a scalar, or [rows, 1]
    fmt: NumberFormat,
) -> Tensor:
    """`formats.quantize` in BF16, which represents the values of every 8-bit format. [rows, n]"""
    scales, x8 = scale.expand(len(x), 1).contiguous(), torch.empty_like(x).contiguous()
    arrays = bits_of(x), scales.numpy(), bits_of(x8)
    _by_rows(numba_loops.round_rows, len(x), *arrays, *rounding(fmt))
    return x8


def count_magnitudes(x: Tensor, counts: Tensor) -> None:
    """`definitions.count_magnitudes` of BF16 values of any shape, added to counts [2**15] int64."""
    numba_loops.count_magnitudes(bits_of(x).ravel(), counts.numpy())


def compare(
    sums: Tensor,  # [5, tokens] float64, changed
    best: Tensor,  # [2, tokens] int64, changed
    offset: int,
    a: Tensor,  # [tokens, pieces] fp32
    b: Tensor,  # [tokens, pieces] fp32
) -> None:
    """`definitions.compare`."""
    a, b = a.detach().contiguous(), b.detach().contiguous()
    arrays = sums.numpy(), best.numpy(), offset, a.numpy(), b.numpy()
    _by_rows(distribution_loops.compare, len(a), *arrays)


def bits_of(x: Tensor) -> NDArray[np.int16]:
    """BF16 as NumPy takes it. Shares memory where x is contiguous."""
    return x.detach().contiguous().view(torch.int16).numpy()


def rounding(fmt: NumberFormat) -> tuple[np.float32, np.int32, np.int32]:
    """The format's maximum, and what picks the step of its grid from the bits of a value in FP32.

    A float's step follows the exponent, down to that of its smallest normal number, 2**-6. That of
    the integers is the step below 2**4, the same everywhere.
    """
    mask, lowest = (numba_loops.EXPONENT, 2.0**-6) if fmt.is_float else (0, 2.0**3)
    return np.float32(fmt.maximum), np.int32(mask), np.float32(lowest).view(np.int32)


def rounding_of(inner: NumberFormat | None) -> tuple[bool, np.float32, np.int32, np.int32]:
    """Whether anything is rounded, and `rounding`."""
    if inner is None:
        return False, np.float32(0), np.int32(0), np.int32(0)
    return True, *rounding(inner)


def _arrays(grid: ColumnGrid) -> tuple[Any, ...]:
    """Group of each column, group scales, zero points, channel scales."""
    tensors = grid.group, grid.group_scale, grid.zero_point, grid.channel_scale[0]
    return tuple(tensor.contiguous().numpy() for tensor in tensors)


def _by_rows(kernel: Callable[..., Any], rows: int, *arguments: Any) -> list[Any]:
    """What `kernel(first, last, …)` returns for ranges of rows, one a thread of torch's."""
    return in_ranges(
        lambda first, last: kernel(first, last, *arguments), rows, numba_loops.TILE_ROWS
    )
