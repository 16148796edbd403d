"""Chosen codes tried on tokens that no Hessian has seen, beside the nearest codes.

Compensation and gradient-aware rounding fit codes to the calibration's Hessian. Where that is of
too few tokens, or of others than are read later, the fit is to noise, and rounding to nearest,
which looks at the weight alone, does better. The objective does not show it, since it is of the
same tokens; others do, some hundreds of which are enough for a layer of many outputs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.errors import listed
from dpq_core.kernels.dispatch import residual
from dpq_core.layer.column_loop import quantize_columns
from dpq_core.layer.objective import relative


@dataclass(frozen=True)
class UnseenErrors:
    """Relative squared errors of the outputs for unseen tokens: of the chosen codes, and of the
    nearest ones on the same grid."""

    chosen: float
    nearest: float

    @property
    def rounding_wins(self) -> bool:
        return self.chosen > self.nearest

    def __str__(self) -> str:
        return (
            f"the chosen codes have a relative error of {self.chosen:.3g} on tokens that no Hessian"
            f" has seen, the nearest ones {self.nearest:.3g}"
        )


def unseen_errors(
    codes: Tensor,  # [in, out] fp32
    weight: Tensor,  # [in, out] fp32
    grid: ColumnGrid,
    tokens: Tensor,  # [tokens, in], any float type
    block_columns: int,
) -> tuple[UnseenErrors, Tensor]:
    """The errors, and the nearest codes [in, out] fp32."""
    tokens = tokens.float()
    whole = _power(tokens, weight)
    chosen = _power(tokens, residual(codes, weight.clone(), grid))
    nearest = quantize_columns(weight.clone(), grid, None, block_columns)
    rounded = _power(tokens, residual(nearest, weight.clone(), grid))
    return UnseenErrors(relative(chosen, whole), relative(rounded, whole)), nearest


def unseen_line(rows: Iterable[Mapping[str, Any]]) -> str:
    """How layers did, from the rows of a manifest; empty where no codes were chosen."""
    errors = [row["unseen"] for row in rows if row.get("unseen")]
    if not errors:
        return ""
    shares = [relative(each["chosen"], each["nearest"]) for each in errors]
    return (
        f"on tokens that no Hessian has seen, layers' errors are {median(shares):.2f} times those"
        f" of rounding to nearest (median of {len(errors)} layers, at worst {max(shares):.2f})"
    )


def lost_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Where rounding to nearest did better, from the rows of a manifest."""
    lost = [row for row in rows if (own := row.get("unseen")) and UnseenErrors(**own).rounding_wins]
    kept = [row["name"] for row in lost if not row.get("rounded")]
    rounded = [row["name"] for row in lost if row.get("rounded")]
    lines = [
        f"rounding to nearest does better on tokens that no Hessian has seen: {listed(kept)}; give"
        " more calibration.samples or other text, or set calibration.where_rounding_wins: round"
    ] * bool(kept)
    if rounded:
        lines.append(f"rounded to nearest, which did better on unseen tokens: {listed(rounded)}")
    return lines


def _power(tokens: Tensor, weight: Tensor) -> float:
    """Σ (x w)² of the outputs [tokens, out]."""
    return float((tokens @ weight).square_().sum(dtype=torch.float64))
