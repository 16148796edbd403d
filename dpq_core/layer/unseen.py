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


@dataclass(frozen=True)
class UnseenSummary:
    """All layers whose codes were chosen, from the rows of a checkpoint's manifest.

    ratio, worst: of a layer's error to that of rounding to nearest, median and largest. lost:
    layers where rounding did better. rounded: of these, those that took the nearest codes.
    """

    layers: int
    ratio: float
    worst: float
    lost: list[str]
    rounded: list[str]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> "UnseenSummary | None":
        """None where no codes were chosen, or there was no token to look at."""
        chosen = [(row, UnseenErrors(**row["unseen"])) for row in rows if row.get("unseen")]
        if not chosen:
            return None
        ratios = [relative(errors.chosen, errors.nearest) for _, errors in chosen]
        lost = [row["name"] for row, errors in chosen if errors.rounding_wins]
        rounded = [row["name"] for row, _ in chosen if row.get("rounded")]
        return cls(len(chosen), median(ratios), max(ratios), lost, rounded)

    @property
    def line(self) -> str:
        return (
            f"on tokens that no Hessian has seen, layers' errors are {self.ratio:.2f} times those"
            f" of rounding to nearest (median of {self.layers} layers, at worst {self.worst:.2f})"
        )

    @property
    def warnings(self) -> list[str]:
        """Where rounding did better, in words."""
        lines = []
        if kept := [name for name in self.lost if name not in self.rounded]:
            lines.append(
                "rounding to nearest does better on tokens that no Hessian has seen:"
                f" {listed(kept)}; give more calibration.samples or other text, or set"
                " calibration.where_rounding_wins: round"
            )
        if self.rounded:
            said = "rounded to nearest, which did better on unseen tokens"
            lines.append(f"{said}: {listed(self.rounded)}")
        return lines


def _power(tokens: Tensor, weight: Tensor) -> float:
    """Σ (x w)² of the outputs [tokens, out]."""
    return float((tokens @ weight).square_().sum(dtype=torch.float64))
