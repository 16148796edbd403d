"""Gradient-aware rounding: move codes by one step where that lowers the layer objective.

For a row with error d = ŵ - w the objective is d H dᵀ and its gradient 2 d H. Moving the code of
column j changes ŵ by δ (after inner rounding) and the objective by

    2 δ (d H)_j + δ² H_jj,

so a step is taken exactly where this is negative: the objective never rises. Columns are visited
one by one (all rows at once, which are independent), in blocks with one trailing product as in the
column loop. Codes stay in 0…15.
"""

import torch
from torch import Tensor

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.kernels import cpu
from dpq_core.kernels.dispatch import kernels_for, residual

# A step must gain this share of δ² H_jj: keeps float noise from moving codes between ties.
_LEAST_GAIN = 1e-3


def refine_codes(
    codes: Tensor,  # [in, out] fp32, changed in place
    weight: Tensor,  # [in, out] fp32, the original
    grid: ColumnGrid,
    hessian: Tensor,  # [in, in] fp32, undamped
    block_columns: int,
    max_passes: int,
) -> int:
    """Passes over all columns until one moves nothing, `max_passes` at most.

    Returns:
        The number of codes moved, over all passes.
    """
    if cpu.fits(codes, weight, hessian):
        gradient = residual(codes, weight.clone(), grid).T @ hessian
        return cpu.refine_codes(codes, gradient, grid, hessian, _LEAST_GAIN, max_passes)
    moved = 0
    rows = torch.arange(codes.shape[1], device=codes.device)  # those that moved last
    for _ in range(max_passes):
        part = codes[:, rows]
        steps = _one_pass(part, weight[:, rows], grid.rows(rows), hessian, block_columns)
        codes[:, rows] = part
        moved += int(steps.sum())
        rows = rows[steps > 0]  # a row in which nothing moved is done: rows are independent
        if len(rows) == 0:
            break
    return moved


def _one_pass(
    codes: Tensor, weight: Tensor, grid: ColumnGrid, hessian: Tensor, block_columns: int
) -> Tensor:
    """Moves codes [in, rows] in place; how many of each row."""
    gradient = hessian @ residual(codes, weight, grid)  # (d H)ᵀ, H is symmetric
    step_columns = kernels_for(codes, weight, hessian).step_columns
    moved = torch.zeros(codes.shape[1], dtype=torch.int64, device=codes.device)
    for start in range(0, len(codes), block_columns):
        block = slice(start, min(start + block_columns, len(codes)))
        corner, part = hessian[block, block], grid.part(block)
        steps = step_columns(codes[block], gradient[block], part, corner, _LEAST_GAIN)
        moved += (steps != 0).sum(0)
        gradient[block.stop :].addmm_(hessian[block.stop :, block], steps)
    return moved
