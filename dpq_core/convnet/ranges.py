"""The range of a layer's inputs, from a histogram of what calibration saw.

percentile: the values below which p and 100 − p percent of what was seen lie.
mse: the smallest mean squared error of rounding, of the whole range shrunk towards zero in steps.

min_max and moving_average are torchao's own observers. Its histogram observer minimises the squared
error as well, but for the number of levels that the storage type has: here they are those that the
scheme uses, so that 4 and 16 bits, which are kept in wider types, are right too.
"""

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
)

from dpq_core.convnet.recipe import ActivationScheme

_SHRINKS = 90  # candidates between a tenth of the range and all of it
_SMALLEST = 0.1
AVERAGING = 0.01  # weight of a new batch in the moving averages


class PercentileObserver(HistogramObserver):
    """Range between two percentiles."""

    def __init__(self, percentile: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.percentile = percentile

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        low, high = percentile_range(self.histogram, self.min_val, self.max_val, self.percentile)
        return self._calculate_qparams(low, high)  # type: ignore[no-any-return]


class SquaredErrorObserver(HistogramObserver):
    """Range of the least squared error."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        levels = self.quant_max - self.quant_min
        low, high = squared_error_range(self.histogram, self.min_val, self.max_val, levels)
        return self._calculate_qparams(low, high)  # type: ignore[no-any-return]


def observer_of(scheme: ActivationScheme) -> tuple[type, dict[str, Any]]:
    """The observer that a recipe asks for, and its arguments."""
    if scheme.range == "percentile":
        return PercentileObserver, {"percentile": scheme.percentile}
    if scheme.range == "mse":
        return SquaredErrorObserver, {}
    if scheme.range == "min_max":
        return MinMaxObserver, {}
    return MovingAverageMinMaxObserver, {"averaging_constant": AVERAGING}


def percentile_range(
    histogram: Tensor, low: Tensor, high: Tensor, percentile: float
) -> tuple[Tensor, Tensor]:
    """Ends between which all but 100 − percentile percent at each end lie, to the width of a bin.

    Args:
        histogram: counts of equal bins between low and high, [bins].
    """
    edges = _edges(histogram, low, high)
    shares = histogram.double().cumsum(0) / histogram.double().sum()
    cut = 1 - percentile / 100
    first = int(torch.searchsorted(shares, torch.tensor(cut, dtype=torch.double), right=True))
    last = int(torch.searchsorted(shares, torch.tensor(1 - cut, dtype=torch.double)))
    last = min(last, len(histogram) - 1)
    return edges[min(first, last)], edges[last + 1]


def squared_error_range(
    histogram: Tensor, low: Tensor, high: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """The shrunk range whose rounding to `levels` steps has the least squared error, each bin
    counted at its middle. Ranges include zero, as the quantizer's do."""
    edges = _edges(histogram, low, high)
    middles = (edges[1:] + edges[:-1]) / 2
    shrinks = torch.linspace(_SMALLEST, 1, _SHRINKS)[:, None]  # [candidates, 1]
    lows, highs = shrinks * low.clamp(max=0), shrinks * high.clamp(min=0)
    scales = ((highs - lows) / levels).clamp(min=torch.finfo(torch.float32).eps)
    zeros = (-lows / scales).round()
    codes = ((middles / scales).round() + zeros).clamp(0, levels)
    errors = ((codes - zeros) * scales - middles).square() @ histogram
    best = int(errors.argmin())
    return lows[best, 0], highs[best, 0]


def _edges(histogram: Tensor, low: Tensor, high: Tensor) -> Tensor:
    steps = torch.arange(len(histogram) + 1) / len(histogram)
    return low + (high - low) * steps
