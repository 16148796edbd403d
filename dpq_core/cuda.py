"""The column loop on a CUDA device: a block of columns of some rows stays in registers.

In plain torch each column of a block launches a dozen kernels, which is what such a loop waits for.
Here one launch does a block of columns: rows are independent, so a program takes 32 of them, loads
the block once, and goes through its columns one by one: a column is picked out of the registers by
a masked sum, its error passed on to the columns still to come by a masked product, n² steps for n
columns as in the definition, without memory between them. 4,096 rows are 128 programs, one for each
of a Hopper's 132 processors.

Order of operations and roundings are those of `column_loop.choose_block`; sums of products differ
in the last digit (fused multiply-add). No GPU has run it: Triton's interpreter has, and it compiles
for SM90 (`tests/core/test_cuda.py`). Gradient passes, scale search and Hessians are still the
definitions there.
"""

import triton
import triton.language as tl
from torch import Tensor

from dpq_core.affine import ColumnGrid
from dpq_core.cpu import rounding_of
from dpq_core.kernels import STEPS

ROWS = 32  # of a program

_STEPS = tl.constexpr(int(STEPS))
_UNITS = tl.constexpr(1.5 * 2**23)  # added and subtracted, it rounds to integers


def choose_block(
    work: Tensor,  # [n, out] fp32, contiguous: the working weight, replaced by the errors
    codes: Tensor,  # [n, out] fp32, contiguous, written
    grid: ColumnGrid,  # of the block's columns
    factor: Tensor,  # [n, n] fp32, U's diagonal block
) -> None:
    """`column_loop.choose_block`."""
    columns, rows = work.shape
    rounds, maximum, mask, lowest = rounding_of(grid.inner)
    choose[(triton.cdiv(rows, ROWS),)](
        work,
        codes,
        factor.contiguous(),
        grid.group,
        grid.group_scale.contiguous(),
        grid.zero_point.contiguous(),
        grid.channel_scale.contiguous(),
        rows,
        columns,
        float(maximum),
        int(mask),
        int(lowest),
        ROUNDS=rounds,
        COLUMNS=triton.next_power_of_2(columns),
        PROGRAM_ROWS=ROWS,
    )


@triton.jit
def _nearest(value: tl.tensor, maximum: tl.tensor, mask: tl.tensor, lowest: tl.tensor) -> tl.tensor:
    """`kernels.nearest`."""
    clamped = tl.minimum(tl.maximum(value, -maximum), maximum)
    step = tl.maximum(clamped.to(tl.int32, bitcast=True) & mask, lowest) + _STEPS
    steps = step.to(tl.float32, bitcast=True)
    return (clamped + steps) - steps


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
    row = tl.program_id(0) * PROGRAM_ROWS + tl.arange(0, PROGRAM_ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    at = column[:, None] * rows + row[None, :]
    there = (column < columns)[:, None] & inside[None, :]
    values = tl.load(work + at, mask=there, other=0.0)
    channel = tl.load(channel_scale + row, mask=inside, other=1.0)
    for j in range(columns):
        here = (column == j)[:, None]
        value = tl.sum(tl.where(here, values, 0.0), 0)
        of = tl.load(group + j) * rows + row
        scale = tl.load(group_scale + of, mask=inside, other=1.0)
        zero = tl.load(zero_point + of, mask=inside, other=0.0)
        steps = tl.div_rn(tl.div_rn(value, channel), scale)
        steps = tl.minimum(tl.maximum(steps, -16.0), 16.0)
        code = (steps + _UNITS) - _UNITS + zero
        code = tl.minimum(tl.maximum(code, 0.0), 15.0)
        decoded = scale * (code - zero)
        if ROUNDS:
            decoded = _nearest(decoded, maximum, mask, lowest)
        pivot = tl.load(factor + j * columns + j)
        error = tl.div_rn(value - channel * decoded, tl.broadcast_to(pivot, (PROGRAM_ROWS,)))
        tl.store(codes + j * rows + row, code, mask=inside)
        later = (column > j) & (column < columns)
        share = tl.load(factor + j * columns + column, mask=later, other=0.0)
        passed = values - share[:, None] * error[None, :]
        values = tl.where(here, error[None, :], passed)
    tl.store(work + at, values, mask=there)
