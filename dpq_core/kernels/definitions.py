"""Inner loops as plain torch states them: what every device's kernels compute.

    choose_block      a block of columns of the column loop      (GPTQ, DPQ)
    step_columns      a block of columns of a gradient pass      (gradient-aware rounding)
    residual          ŵ - w
    group_errors      one tried range of the scale search
    count_magnitudes  the histogram of calibration's inputs
    compare           a tile of two models' logits              (`evaluation.divergence`)

`cpu` (Numba) and `cuda` (Triton) have functions of the same names with the same order of operations
and the same roundings; sums of products differ in the last digit. `dispatch` chooses.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpq_core.arithmetic.affine import CODES, Affine, ColumnGrid
from dpq_core.arithmetic.formats import NumberFormat


def choose_block(
    work: Tensor,  # [n, out] fp32, the working weight, replaced by the errors
    codes: Tensor,  # [n, out] fp32, written
    grid: ColumnGrid,  # of the block's columns
    factor: Tensor,  # [n, n] fp32, U's diagonal block
) -> None:
    """Codes of a block's columns, and the errors that the columns after it take."""
    columns = grid[:]
    for j in range(len(work)):
        column = columns[j]
        codes[j] = column.encode(work[j])
        work[j].sub_(column.decode(codes[j])).div_(factor[j, j])
        work[j + 1 :].addr_(factor[j, j + 1 :], work[j], alpha=-1)


def step_columns(
    codes: Tensor,  # [n, out] fp32, changed
    gradient: Tensor,  # [n, out] fp32: d H of the block's columns, used up
    grid: ColumnGrid,  # of the block's columns
    hessian: Tensor,  # [n, n] fp32, the diagonal block
    least_gain: float,
) -> Tensor:
    """Steps of a block's columns, one after the other: what each adds to ŵ. [n, out]"""
    steps, columns, diagonal = torch.zeros_like(codes), grid[:], hessian.diagonal()
    for j in range(len(codes)):
        moved = _best_step(codes[j], gradient[j], diagonal[j], columns[j], least_gain)
        codes[j], steps[j] = moved
        gradient[j:].addr_(hessian[j:, j], steps[j])
    return steps


def _best_step(
    codes: Tensor, gradient: Tensor, curvature: Tensor, column: Affine, least_gain: float
) -> tuple[Tensor, Tensor]:
    """New codes of one column and the change of its decoded weight, all [out].

    The weight grows with the code, so only a step against the gradient's sign can gain.
    """
    candidate = (codes - gradient.sign()).clamp_(CODES.minimum, CODES.maximum)
    change = column.decode(candidate) - column.decode(codes)
    gain = -(2 * gradient + change * curvature) * change
    better = gain > least_gain * curvature * change.square()
    return torch.where(better, candidate, codes), torch.where(better, change, 0)


def residual(
    codes: Tensor,  # [in, out] fp32
    weight: Tensor,  # [in, out] fp32, used up
    grid: ColumnGrid,
) -> Tensor:
    """ŵ - w [in, out], in the place of w."""
    return torch.sub(grid.decode(codes), weight, out=weight)


def split_groups(values: Tensor, group_size: int) -> Tensor:
    """[rows, in] → [rows, G, group_size]; a short last group is filled with zeros, which every
    range includes and no error counts."""
    missing = -values.shape[1] % group_size
    groups: Tensor = pad(values, (0, missing)).unflatten(1, (-1, group_size))
    return groups


def group_errors(
    scaled: Tensor,  # [out, in] fp32, in units of s8
    importance: Tensor,  # [in] fp32
    group_size: int,
    group_scale: Tensor,  # [out, G] fp32
    zero_point: Tensor,  # [out, G] fp32
    inner: NumberFormat | None,
) -> Tensor:  # [out, G] fp32
    """Σ importance · (w / s8 - ŵ8)² of each group."""
    groups = split_groups(scaled, group_size)
    weights = split_groups(importance[None], group_size)[0]
    one, scale, zero = scaled.new_ones(()), group_scale.unsqueeze(2), zero_point.unsqueeze(2)
    affine = Affine(one, scale, zero, inner)
    residual = affine.decode8(affine.encode(groups)).sub_(groups)
    return residual.square_().mul_(weights).sum(2)


MAGNITUDES = 1 << 15  # bit patterns of a non-negative bf16


def count_magnitudes(x: Tensor) -> Tensor:
    """Occurrences [2**15] int64 of each |x|, of any shape, rounded to BF16."""
    bits = x.to(torch.bfloat16).view(torch.int16).flatten().int() & (MAGNITUDES - 1)
    return torch.bincount(bits, minlength=MAGNITUDES)


LEAST = torch.finfo(torch.float64).min  # the largest of no logits


def compare(
    sums: Tensor,  # [5, tokens] float64, changed
    best: Tensor,  # [2, tokens] int64, changed
    offset: int,  # the tile's first piece
    a: Tensor,  # [tokens, pieces] fp32, logits of one model
    b: Tensor,  # [tokens, pieces] fp32, of another
) -> None:
    """Add a tile of logits to running sums, in float64. With m and n the largest a and b so far,
    which rows 0 and 3 of `sums` hold (`LEAST` before the first tile):

        1: Σ exp(a − m)    2: Σ exp(a − m) (a − b)    4: Σ exp(b − n)

    best: the first piece of m, and of n. A NaN is not the largest; it is in the sums.
    """
    a, b = a.double(), b.double()
    share, shrunk = _shares(sums[0], best[0], offset, a)
    sums[1] = sums[1] * shrunk + share.sum(-1)
    # A piece that one model excludes (−∞) counts nothing, whatever the other says of it.
    sums[2] = sums[2] * shrunk + torch.where(share > 0, share * (a - b), 0.0).sum(-1)
    share, shrunk = _shares(sums[3], best[1], offset, b)
    sums[4] = sums[4] * shrunk + share.sum(-1)


def _shares(largest: Tensor, best: Tensor, offset: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logit − the largest so far), and what sums over earlier tiles are multiplied with.
    Changes `largest` and `best`."""
    top, place = torch.where(logits.isnan(), -torch.inf, logits).max(-1)
    higher, old = top > largest, largest.clone()
    largest[higher], best[higher] = top[higher], place[higher] + offset
    return (logits - largest[:, None]).exp(), (old - largest).exp()
