"""The column loop that every method shares: choose a column's codes, pass its error on.

GPTQ (Frantar et al., 2023), on static groups and in any column order π. With H⁻¹ = Uᵀ U, U upper
triangular, quantizing column j of the working weight changes the columns still to come by

    w[:, l] -= (w[:, j] - ŵ[:, j]) / U[j, j] * U[j, l],   l > j,

which is the change that keeps the layer objective lowest. Columns are handled in blocks: inside a
block one by one, then all columns after it by one product. Everything is transposed here (a column
of the weight is a contiguous row), which is what makes the inner steps cheap. A block's steps are
`choose_block` of `dpq_core.kernels.definitions`.

DPQ differs from GPTQ in one thing: ŵ contains the rounding to the 8-bit inner format, so that this
error is compensated as well.
"""

import torch
from torch import Tensor

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.kernels.dispatch import kernels_for

_INVERSE_BLOCK = 256
_DAMPING_ATTEMPTS = 4  # the recipe's damping, then three times tenfold


class FactorizationError(ValueError):
    """The Hessian has no Cholesky factor even with the most damping."""


def inverse_factor(hessian: Tensor, damp_frac: float) -> tuple[Tensor, float]:
    """U of H⁻¹ = Uᵀ U, and the damping (a fraction of the mean diagonal) that it took.

    Columns that calibration never excited have an all-zero row in H: damping alone makes them
    regular, and they neither receive nor pass on any error.

    Read backwards in both directions (J), H has the Cholesky factor L, J H J = L Lᵀ, and then
    U = J L⁻¹ J: one factorisation and one triangular inverse, both in place, no inverse of H.

    Args:
        hessian: [in, in] fp32, symmetric. Not changed.
        damp_frac: first damping to try.

    Raises:
        FactorizationError: after three tenfold increases of the damping.
    """
    mean = hessian.diagonal().mean()
    if mean <= 0:  # calibration saw only zeros: nothing can be compensated
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), damp_frac
    for attempt in range(_DAMPING_ATTEMPTS):
        damping = damp_frac * 10**attempt
        reversed_ = hessian.flip(0, 1)
        reversed_.diagonal().add_(damping * mean)
        lower = reversed_.mT  # symmetric: the same matrix, in LAPACK's layout
        failure = torch.zeros((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failure))
        if failure == 0 and torch.isfinite(lower.diagonal()).all():
            _invert_lower(lower)
            return lower.flip(0, 1), damping
    raise FactorizationError(
        f"the Hessian is not positive definite with damping {damping:g} of its mean diagonal: "
        "raise calibration.samples or scheme.damp_frac"
    )


def _invert_lower(lower: Tensor) -> None:
    """L ← L⁻¹ for lower triangular L, in place, a block of rows at a time:
    X[i, :i] = -L[i, i]⁻¹ (L[i, :i] X[:i, :i])."""
    for start in range(0, len(lower), _INVERSE_BLOCK):
        stop = min(start + _INVERSE_BLOCK, len(lower))
        corner = lower[start:stop, start:stop]
        identity = torch.eye(stop - start, dtype=lower.dtype, device=lower.device)
        corner.copy_(torch.linalg.solve_triangular(corner, identity, upper=False))
        left = lower[start:stop, :start]
        left.copy_(corner @ (left @ lower[:start, :start])).neg_()


def quantize_columns(
    weight: Tensor,  # [in, out] fp32, transposed and in the order π
    grid: ColumnGrid,  # of the same columns in the same order
    factor: Tensor | None,  # [in, in] fp32, U of H⁻¹ in the order π; None: errors stay (RTN)
    block_columns: int,
) -> Tensor:  # codes [in, out] fp32
    """Codes of all columns. With a factor, `weight` is used up as the working weight."""
    codes = torch.empty_like(weight, memory_format=torch.contiguous_format)
    choose_block = kernels_for(weight).choose_block
    for start in range(0, len(weight), block_columns):
        block = slice(start, min(start + block_columns, len(weight)))
        if factor is None:
            codes[block] = grid[block].encode(weight[block])
            continue
        choose_block(weight[block], codes[block], grid.part(block), factor[block, block])
        rest = slice(block.stop, None)
        weight[rest].addmm_(factor[block, rest].T, weight[block], alpha=-1)
    return codes
