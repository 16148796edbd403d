"""Compiled loops of quantization for CPUs: NumPy in, NumPy out. `dpq_core.kernels.cpu` calls them.

Each stands for a definition in plain torch, named in its docstring, and has that definition's order
of operations, roundings included. Only sums of products differ, in the last digit: fused
multiply-add, and another order. Rows of a weight are independent: a kernel takes the rows first …
last - 1, so that threads can share a weight, and in the column loop a row is a lane of the vector
units.

Numba compiles for the machine at hand and keeps the code in its cache, which it throws away when
this file changes: so everything compiled with `cache` stands in this one file.
"""

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

TILE_ROWS = 64
_CHUNK = 64  # columns that `refine` looks at together
_LINE = 16  # rows that it reads together: what a cache line holds

_Array = NDArray[np.float32]
_ANY = {"inline": "always", "error_model": "numpy"}

STEPS = np.int32(20 << 23 | 1 << 22)  # times 1.5 · 2**20, for 23 − 3 bits of mantissa
_UNITS, _TWO = np.float32(1.5 * 2**23), np.float32(2)
EXPONENT = np.int32(0x7F80_0000)
_SIGN, _MAGNITUDE = np.int32(-0x8000_0000), np.int16(0x7FFF)
_MOST_STEPS, _LOWEST_CODE, _HIGHEST_CODE = np.float32(16), np.float32(0), np.float32(15)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: compiled when first called, without Python's lock, and kept in Numba's cache
    where it finds a folder to write to."""

    def decorate(function: Callable[..., Any]) -> Any:
        jit = functools.partial(numba.njit, nogil=True, error_model="numpy", **options)
        try:
            return jit(cache=True)(function)
        except RuntimeError:  # neither this file's folder nor the user's own can be written
            return jit()(function)

    return decorate


@numba.njit(**_ANY)
def bits(value: Any) -> Any:
    """The bits of an FP32 number."""
    return np.float32(value).view(np.int32)


@numba.njit(**_ANY)
def real(pattern: Any) -> Any:
    """The FP32 number of these bits."""
    return np.int32(pattern).view(np.float32)


@numba.njit(**_ANY)
def nearest(value: Any, maximum: Any, mask: Any, lowest: Any) -> Any:
    """`formats.round_to` of an FP32 number that is no NaN; zero loses its sign.

    `maximum`, `mask` and `lowest` are of `cpu.rounding`. Adding and subtracting 1.5 · 2**23 steps
    leaves FP32 no bits below a step, and rounds to nearest, ties to even.
    """
    clamped = min(max(value, -maximum), maximum)
    steps = real(max(np.int32(bits(clamped) & mask), lowest) + STEPS)
    return (clamped + steps) - steps


@numba.njit(**_ANY)
def _encoded(quotient: Any, zero_point: Any) -> Any:
    """Code 0…15 of w / s8 / s4: more than 16 steps are clamped afterwards in any case."""
    steps = min(max(quotient, -_MOST_STEPS), _MOST_STEPS)
    return min(max((steps + _UNITS) - _UNITS + zero_point, _LOWEST_CODE), _HIGHEST_CODE)


@compiled()
def choose(
    first: int,
    last: int,
    work: _Array,  # [n, out], the working weight, replaced by the errors
    codes: _Array,  # [n, out], written
    factor: _Array,  # [n, n], transposed: row j has what column j takes of the columns before it
    group: NDArray[np.int64],  # [n]
    group_scale: _Array,  # [G, out]
    zero_point: _Array,  # [G, out]
    channel_scale: _Array,  # [out]
    rounds: bool,
    maximum: np.float32,
    mask: np.int32,
    lowest: np.int32,
) -> None:
    """`definitions.choose_block`, by tiles whose errors stay in the first cache. A column takes the
    errors of the columns before it when its turn comes, instead of passing its own on."""
    columns = len(work)
    errors = np.zeros((columns, TILE_ROWS), np.float32)
    for start in range(first, last, TILE_ROWS):
        rows = min(TILE_ROWS, last - start)
        for j in range(columns):
            column = errors[j]
            for row in range(rows):
                column[row] = work[j, start + row]
            _take_errors(column, errors, factor[j], j)
            diagonal, of = factor[j, j], group[j]
            for row in range(rows):
                at = start + row
                channel, scale, zero = channel_scale[at], group_scale[of, at], zero_point[of, at]
                code = _encoded(column[row] / channel / scale, zero)
                value = scale * (code - zero)
                if rounds:
                    value = nearest(value, maximum, mask, lowest)
                codes[j, at] = code
                column[row] = (column[row] - channel * value) / diagonal
        for j in range(columns):
            for row in range(rows):
                work[j, start + row] = errors[j, row]


@compiled(fastmath={"contract"})
def _take_errors(column: _Array, errors: _Array, factor: _Array, before: int) -> None:
    """column -= Σ factor[i] · errors[i] over the columns before it, eight at a time."""
    whole = before // 8 * 8
    for i in range(0, whole, 8):
        a, b, c, d = factor[i], factor[i + 1], factor[i + 2], factor[i + 3]
        e, f, g, h = factor[i + 4], factor[i + 5], factor[i + 6], factor[i + 7]
        for row in range(TILE_ROWS):
            even = column[row] - a * errors[i, row] - c * errors[i + 2, row]
            odd = b * errors[i + 1, row] + d * errors[i + 3, row]
            even = even - e * errors[i + 4, row] - g * errors[i + 6, row]
            odd = odd + f * errors[i + 5, row] + h * errors[i + 7, row]
            column[row] = even - odd
    for i in range(whole, before):
        for row in range(TILE_ROWS):
            column[row] -= factor[i] * errors[i, row]


@compiled()
def residual(
    first: int,
    last: int,
    codes: _Array,  # [n, out]
    weight: _Array,  # [n, out], replaced by ŵ - w
    group: NDArray[np.int64],  # [n]
    group_scale: _Array,  # [G, out]
    zero_point: _Array,  # [G, out]
    channel_scale: _Array,  # [out]
    rounds: bool,
    maximum: np.float32,
    mask: np.int32,
    lowest: np.int32,
) -> None:
    """`Affine.decode` less the weight."""
    for j in range(len(codes)):
        of = group[j]
        for row in range(first, last):
            value = group_scale[of, row] * (codes[j, row] - zero_point[of, row])
            if rounds:
                value = nearest(value, maximum, mask, lowest)
            weight[j, row] = channel_scale[row] * value - weight[j, row]


@compiled()
def refine(
    first: int,
    last: int,
    codes: _Array,  # [n, out], changed
    gradient: _Array,  # [out, n], d H, kept up to date
    hessian: _Array,  # [n, n]
    diagonal: _Array,  # [n]
    least_gain: np.float32,
    passes: int,
    group: NDArray[np.int64],  # [n]
    group_scale: _Array,  # [G, out]
    zero_point: _Array,  # [G, out]
    channel_scale: _Array,  # [out]
    rounds: bool,
    maximum: np.float32,
    mask: np.int32,
    lowest: np.int32,
) -> int:
    """`gradient_rounding.refine_codes` of some rows: codes moved.

    Few codes move. So a row looks at 64 columns at once, and takes the first step among them that
    gains, which changes its whole gradient; then at what follows that column.
    """
    columns = len(codes)
    tile = np.empty((_LINE, columns), np.float32)
    scales, zeros = np.empty_like(tile), np.empty_like(tile)
    value, step = np.empty(columns, np.float32), np.empty(columns, np.float32)
    gains = np.empty(columns, np.bool_)
    moved = 0
    for row in range(first, last):
        line = (row - first) % _LINE
        if line == 0:
            for j in range(columns):
                of = group[j]
                for other in range(min(_LINE, last - row)):
                    tile[other, j] = codes[j, row + other]
                    scales[other, j] = group_scale[of, row + other]
                    zeros[other, j] = zero_point[of, row + other]
        code, scale, zero = tile[line], scales[line], zeros[line]
        slope, channel = gradient[row], channel_scale[row]
        for j in range(columns):
            value[j] = scale[j] * (code[j] - zero[j])
            if rounds:
                value[j] = nearest(value[j], maximum, mask, lowest)
            value[j] *= channel
        for _ in range(passes):
            before = moved
            for start in range(0, columns, _CHUNK):
                stop, j = min(start + _CHUNK, columns), start
                while j < stop:
                    found = False
                    for i in range(j, stop):
                        new = scale[i] * (_one_step(code[i], slope[i]) - zero[i])
                        if rounds:
                            new = nearest(new, maximum, mask, lowest)
                        change = channel * new - value[i]
                        gain = -(_TWO * slope[i] + change * diagonal[i]) * change
                        step[i] = change
                        gains[i] = gain > least_gain * diagonal[i] * (change * change)
                        found |= gains[i]
                    if not found:
                        break
                    while not gains[j]:
                        j += 1
                    code[j] = _one_step(code[j], slope[j])
                    value[j] += step[j]
                    _add_scaled(slope, hessian[j], step[j])
                    moved += 1
                    j += 1
            if moved == before:
                break
        if line == _LINE - 1 or row == last - 1:
            for j in range(columns):
                for other in range(line + 1):
                    codes[j, row - line + other] = tile[other, j]
    return moved


@numba.njit(**_ANY)
def _one_step(code: Any, slope: Any) -> Any:
    """The code after a step against the gradient, where there is one."""
    sign = np.float32(slope > 0) - np.float32(slope < 0)
    return min(max(code - sign, _LOWEST_CODE), _HIGHEST_CODE)


@compiled(fastmath={"contract"})
def _add_scaled(total: _Array, addend: _Array, factor: np.float32) -> None:
    for i in range(len(total)):
        total[i] += factor * addend[i]


@compiled()
def group_errors(
    first: int,
    last: int,
    weight: _Array,  # [out, n], in units of s8
    importance: _Array,  # [n]
    group_size: int,
    group_scale: _Array,  # [out, G]
    zero_point: _Array,  # [out, G]
    errors: _Array,  # [out, G], written
    rounds: bool,
    maximum: np.float32,
    mask: np.int32,
    lowest: np.int32,
) -> None:
    """`definitions.group_errors`."""
    columns = weight.shape[1]
    terms = np.empty(group_size, np.float32)
    for row in range(first, last):
        for group in range(group_scale.shape[1]):
            start = group * group_size
            width = min(group_size, columns - start)
            scale, zero = group_scale[row, group], zero_point[row, group]
            values, weights = weight[row, start:], importance[start:]
            for i in range(width):
                value = scale * (_encoded(values[i] / scale, zero) - zero)
                if rounds:
                    value = nearest(value, maximum, mask, lowest)
                difference = value - values[i]
                terms[i] = difference * difference * weights[i]
            errors[row, group] = _total(terms[:width])


@compiled(fastmath={"reassoc"})
def _total(terms: _Array) -> Any:
    total = np.float32(0)
    for term in terms:
        total += term
    return total


@compiled()
def round_rows(
    first: int,
    last: int,
    x: NDArray[np.int16],  # [rows, in] bf16
    scale: _Array,  # [rows, 1]
    x8: NDArray[np.int16],  # [rows, in] bf16, written
    maximum: np.float32,
    mask: np.int32,
    lowest: np.int32,
) -> None:
    """`formats.quantize`, of BF16 into BF16, which NumPy holds as int16. Zero keeps its sign."""
    for row in range(first, last):
        for column in range(x.shape[1]):
            quotient = real(np.int32(x[row, column]) << 16) / scale[row, 0]
            rounded = bits(nearest(quotient, maximum, mask, lowest))
            x8[row, column] = (rounded | (bits(quotient) & _SIGN)) >> 16


@compiled()
def count_magnitudes(x: NDArray[np.int16], counts: NDArray[np.int64]) -> None:
    """`definitions.count_magnitudes` of BF16 [n], added to counts [2**15]."""
    for value in x:
        counts[value & _MAGNITUDE] += 1
