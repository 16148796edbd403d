"""Quantization's inner loops on a CUDA device, as Triton kernels.

    choose_block      a block of columns of the column loop
    step_columns      a block of columns of a gradient pass
    group_errors      one tried range of the scale search
    count_magnitudes  the histogram of calibration's inputs

In plain torch each column of a block launches a dozen kernels, which is what such a loop waits for.
Here one launch does a block: rows are independent, so a program takes 32 of them, loads the block
once, and goes through its columns one by one: a column is picked out of the registers by a masked
sum, and what it passes on goes to the columns still to come by a masked product. 4,096 rows are 128
programs, one for each of a Hopper's 132 processors.

Order of operations and roundings are the definitions' of the same names; sums of products differ in
the last digit (fused multiply-add). Runs on a GPU (`make bench-gpu`) and in Triton's interpreter,
and compiles for SM90 without spilling registers (`tests/core/kernels/test_cuda.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.arithmetic.formats import NumberFormat
from dpq_core.kernels.cpu import rounding_of
from dpq_core.kernels.numba_loops import STEPS

ROWS = 32  # of a program
_CHUNK = 128  # columns of a group that are looked at together

_COPIES = 32  # of a histogram
_COUNTED = 4096  # values of a program
_MOST_COUNTED = 1 << 30  # of a launch: places are 32-bit numbers

_STEPS = tl.constexpr(int(STEPS))
_UNITS = tl.constexpr(1.5 * 2**23)  # added and subtracted, it rounds to integers


def choose_block(
    work: Tensor,  # [n, out] fp32, contiguous: the working weight, replaced by the errors
    codes: Tensor,  # [n, out] fp32, contiguous, written
    grid: ColumnGrid,  # of the block's columns
    factor: Tensor,  # [n, n] fp32, U's diagonal block
) -> None:
    """`definitions.choose_block`."""
    columns, rows = work.shape
    choose[(triton.cdiv(rows, ROWS),)](
        work,
        codes,
        factor.contiguous(),
        *_grid(grid),
        rows,
        columns,
        *_limits(grid.inner),
        ROUNDS=grid.inner is not None,
        COLUMNS=triton.next_power_of_2(columns),
        PROGRAM_ROWS=ROWS,
    )


def step_columns(
    codes: Tensor,  # [n, out] fp32, contiguous, changed
    gradient: Tensor,  # [n, out] fp32, contiguous: d H of the block's columns
    grid: ColumnGrid,  # of the block's columns
    hessian: Tensor,  # [n, n] fp32, the diagonal block
    least_gain: float,
) -> Tensor:
    """`definitions.step_columns`. [n, out]"""
    columns, rows = codes.shape
    steps = torch.empty_like(codes)
    step[(triton.cdiv(rows, ROWS),)](
        codes,
        gradient,
        steps,
        hessian.T.contiguous(),
        *_grid(grid),
        rows,
        columns,
        *_limits(grid.inner),
        least_gain,
        ROUNDS=grid.inner is not None,
        COLUMNS=triton.next_power_of_2(columns),
        PROGRAM_ROWS=ROWS,
    )
    return steps


def group_errors(
    scaled: Tensor,  # [out, in] fp32, contiguous, in units of s8
    importance: Tensor,  # [in] fp32
    group_size: int,
    group_scale: Tensor,  # [out, G] fp32
    zero_point: Tensor,  # [out, G] fp32
    inner: NumberFormat | None,
) -> Tensor:  # [out, G] fp32
    """`definitions.group_errors`."""
    rows, features = scaled.shape
    errors = torch.empty_like(group_scale)
    groups = group_scale.shape[1]
    errors_of[(triton.cdiv(rows, ROWS), groups)](
        errors,
        scaled,
        importance.contiguous(),
        group_scale.contiguous(),
        zero_point.contiguous(),
        rows,
        features,
        groups,
        group_size,
        *_limits(inner),
        ROUNDS=inner is not None,
        CHUNK=min(_CHUNK, triton.next_power_of_2(group_size)),
        PROGRAM_ROWS=ROWS,
    )
    return errors


def count_magnitudes(x: Tensor, bins: int) -> Tensor:
    """`definitions.count_magnitudes` of BF16 values of any shape. [bins] int64.

    Programs add to copies of the histogram, in the L2 cache: few values are so frequent that
    processors would wait for one another at a single one.
    """
    bits = x.contiguous().view(torch.int16).view(-1)
    counts = torch.zeros(_COPIES, bins, dtype=torch.int32, device=x.device)
    for part in bits.split(_MOST_COUNTED):
        count[(triton.cdiv(len(part), _COUNTED),)](
            counts, part, len(part), BINS=bins, COPIES=_COPIES, BLOCK=_COUNTED
        )
    return counts.sum(0, dtype=torch.int64)


def _grid(grid: ColumnGrid) -> tuple[Tensor, ...]:
    tensors = grid.group, grid.group_scale, grid.zero_point, grid.channel_scale
    return tuple(tensor.contiguous() for tensor in tensors)


def _limits(inner: NumberFormat | None) -> tuple[float, int, int]:
    """Maximum, mask and lowest of `cpu.rounding`."""
    _, maximum, mask, lowest = rounding_of(inner)
    return float(maximum), int(mask), int(lowest)


@triton.jit
def _nearest(value: tl.tensor, maximum: tl.tensor, mask: tl.tensor, lowest: tl.tensor) -> tl.tensor:
    """`numba_loops.nearest`."""
    clamped = tl.minimum(tl.maximum(value, -maximum), maximum)
    step = tl.maximum(clamped.to(tl.int32, bitcast=True) & mask, lowest) + _STEPS
    steps = step.to(tl.float32, bitcast=True)
    return (clamped + steps) - steps


@triton.jit
def _encoded(quotient: tl.tensor, zero: tl.tensor) -> tl.tensor:
    """`numba_loops._encoded`."""
    steps = tl.minimum(tl.maximum(quotient, -16.0), 16.0)
    return tl.minimum(tl.maximum((steps + _UNITS) - _UNITS + zero, 0.0), 15.0)


@triton.jit
def _decoded(
    code: tl.tensor, scale: tl.tensor, zero: tl.tensor, maximum: tl.tensor, mask: tl.tensor,
    lowest: tl.tensor, ROUNDS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`Affine.decode8`."""
    value = scale * (code - zero)
    if ROUNDS:
        value = _nearest(value, maximum, mask, lowest)
    return value


@triton.jit
def _block(
    rows: tl.tensor, columns: tl.tensor, COLUMNS: tl.constexpr, PROGRAM_ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What a program works on: its rows, the columns, where they lie in [columns, rows], and which
    exist."""
    row = tl.program_id(0) * PROGRAM_ROWS + tl.arange(0, PROGRAM_ROWS)
    column = tl.arange(0, COLUMNS)
    at = column[:, None] * rows + row[None, :]
    return row, column, at, (column < columns)[:, None] & (row < rows)[None, :]


@triton.jit
def _of_column(
    group: tl.tensor, group_scale: tl.tensor, zero_point: tl.tensor, rows: tl.tensor,
    row: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Scale and zero point of a column for some rows. group: where the column's group stands."""
    of = tl.load(group) * rows + row
    scale = tl.load(group_scale + of, mask=row < rows, other=1.0)
    return scale, tl.load(zero_point + of, mask=row < rows, other=0.0)


@triton.jit(do_not_specialize=["columns", "mask", "lowest"])
def choose(
    work: tl.tensor,  # [columns, rows] fp32, the working weight, replaced by the errors
    codes: tl.tensor,  # [columns, rows] fp32, written
    factor: tl.tensor,  # [columns, columns] fp32
    group: tl.tensor,  # [columns] int64
    group_scale: tl.tensor,  # [G, rows] fp32
    zero_point: tl.tensor,  # [G, rows] fp32
    channel_scale: tl.tensor,  # [rows] fp32
    rows: tl.tensor,
    columns: tl.tensor,
    maximum: tl.tensor,
    mask: tl.tensor,
    lowest: tl.tensor,
    ROUNDS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two
    PROGRAM_ROWS: tl.constexpr,
) -> None:
    """Grid: (row tiles,)."""
    row, column, at, there = _block(rows, columns, COLUMNS, PROGRAM_ROWS)
    inside = row < rows
    values = tl.load(work + at, mask=there, other=0.0)
    channel = tl.load(channel_scale + row, mask=inside, other=1.0)
    for j in range(columns):
        here = (column == j)[:, None]
        value = tl.sum(tl.where(here, values, 0.0), 0)
        scale, zero = _of_column(group + j, group_scale, zero_point, rows, row)
        code = _encoded(tl.div_rn(tl.div_rn(value, channel), scale), zero)
        decoded = _decoded(code, scale, zero, maximum, mask, lowest, ROUNDS)
        pivot = tl.load(factor + j * columns + j)
        error = tl.div_rn(value - channel * decoded, tl.broadcast_to(pivot, (PROGRAM_ROWS,)))
        tl.store(codes + j * rows + row, code, mask=inside)
        later = (column > j) & (column < columns)
        share = tl.load(factor + j * columns + column, mask=later, other=0.0)
        passed = values - share[:, None] * error[None, :]
        values = tl.where(here, error[None, :], passed)
    tl.store(work + at, values, mask=there)


@triton.jit(do_not_specialize=["columns", "mask", "lowest"])
def step(
    codes: tl.tensor,  # [columns, rows] fp32, changed
    gradient: tl.tensor,  # [columns, rows] fp32
    steps: tl.tensor,  # [columns, rows] fp32, written
    hessian: tl.tensor,  # [columns, columns] fp32, transposed
    group: tl.tensor,  # [columns] int64
    group_scale: tl.tensor,  # [G, rows] fp32
    zero_point: tl.tensor,  # [G, rows] fp32
    channel_scale: tl.tensor,  # [rows] fp32
    rows: tl.tensor,
    columns: tl.tensor,
    maximum: tl.tensor,
    mask: tl.tensor,
    lowest: tl.tensor,
    least_gain: tl.tensor,
    ROUNDS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two
    PROGRAM_ROWS: tl.constexpr,
) -> None:
    """Grid: (row tiles,)."""
    row, column, at, there = _block(rows, columns, COLUMNS, PROGRAM_ROWS)
    inside = row < rows
    values = tl.load(gradient + at, mask=there, other=0.0)
    channel = tl.load(channel_scale + row, mask=inside, other=1.0)
    for j in range(columns):
        slope = tl.sum(tl.where((column == j)[:, None], values, 0.0), 0)
        scale, zero = _of_column(group + j, group_scale, zero_point, rows, row)
        code = tl.load(codes + j * rows + row, mask=inside, other=0.0)
        against = tl.where(slope > 0, 1.0, 0.0) - tl.where(slope < 0, 1.0, 0.0)
        candidate = tl.minimum(tl.maximum(code - against, 0.0), 15.0)
        before = _decoded(code, scale, zero, maximum, mask, lowest, ROUNDS)
        after = _decoded(candidate, scale, zero, maximum, mask, lowest, ROUNDS)
        # One product: two, contracted to a fused multiply-add, give equals a difference.
        change = channel * (after - before)
        curvature = tl.load(hessian + j * columns + j)
        gain = -(2 * slope + change * curvature) * change
        better = gain > least_gain * curvature * (change * change)
        change = tl.where(better, change, 0.0)
        tl.store(codes + j * rows + row, tl.where(better, candidate, code), mask=inside)
        tl.store(steps + j * rows + row, change, mask=inside)
        share = tl.load(hessian + j * columns + column, mask=column < columns, other=0.0)
        values += share[:, None] * change[None, :]


@triton.jit(do_not_specialize=["group_size", "mask", "lowest"])
def errors_of(
    errors: tl.tensor,  # [rows, groups] fp32, written
    scaled: tl.tensor,  # [rows, features] fp32
    importance: tl.tensor,  # [features] fp32
    group_scale: tl.tensor,  # [rows, groups] fp32
    zero_point: tl.tensor,  # [rows, groups] fp32
    rows: tl.tensor,
    features: tl.tensor,
    groups: tl.tensor,
    group_size: tl.tensor,
    maximum: tl.tensor,
    mask: tl.tensor,
    lowest: tl.tensor,
    ROUNDS: tl.constexpr,
    CHUNK: tl.constexpr,  # columns, a power of two
    PROGRAM_ROWS: tl.constexpr,
) -> None:
    """Grid: (row tiles, groups)."""
    row = tl.program_id(0) * PROGRAM_ROWS + tl.arange(0, PROGRAM_ROWS)
    group = tl.program_id(1)
    inside = row < rows
    of = row.to(tl.int64) * groups + group
    scale = tl.load(group_scale + of, mask=inside, other=1.0)[:, None]
    zero = tl.load(zero_point + of, mask=inside, other=0.0)[:, None]
    last = tl.minimum((group + 1) * group_size, features)
    total = tl.zeros((PROGRAM_ROWS,), tl.float32)
    for first in range(group * group_size, last, CHUNK):
        column = first + tl.arange(0, CHUNK)
        there = inside[:, None] & (column < last)[None, :]
        at = row.to(tl.int64)[:, None] * features + column[None, :]
        weight = tl.load(scaled + at, mask=there, other=0.0)
        wide = tl.broadcast_to(scale, (PROGRAM_ROWS, CHUNK))
        code = _encoded(tl.div_rn(weight, wide), zero)
        value = _decoded(code, scale, zero, maximum, mask, lowest, ROUNDS)
        share = tl.load(importance + column, mask=column < last, other=0.0)
        total += tl.sum((value - weight) * (value - weight) * share[None, :], 1)
    tl.store(errors + of, total, mask=inside)


@triton.jit
def count(
    counts: tl.tensor,  # [COPIES, BINS] int32, added to
    bits: tl.tensor,  # [n] int16, of bf16
    n: tl.tensor,
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid: (blocks of values,)."""
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    magnitude = tl.load(bits + at, mask=at < n, other=0).to(tl.int32) & (BINS - 1)
    copy = (program % COPIES) * BINS
    tl.atomic_add(counts + copy + magnitude, 1, mask=at < n, sem="relaxed")
