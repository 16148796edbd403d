"""The range of a tensor of activations, from what calibration or training saw of it.

    min_max         the smallest and the largest value
    moving_average  of each batch's; the first batch's to begin with (whitepaper, section 3.1.1)
    percentile      the values below which p and 100 − p percent of what was seen lie
    mse             the least mean squared error of rounding, of the whole range shrunk towards zero

The last two read a histogram whose bins grow with what is seen.
"""

from typing import Protocol

import torch
from torch import Tensor

from dpq_core.convnet.recipe import ActivationScheme

_SHRINKS = 90  # candidates between a tenth of the range and all of it
_SMALLEST = 0.1
_AVERAGING = 0.01  # weight of a new batch in the moving averages
_BINS = 2048


class Range(Protocol):
    """What was seen, and the ends that a grid of so many steps should have."""

    def update(self, x: Tensor) -> None: ...

    def ends(self, levels: int) -> tuple[Tensor, Tensor]: ...


def range_of(scheme: ActivationScheme, training: bool = False) -> Range:
    """The range that a recipe asks for; in training averages, which follow the network."""
    if scheme.range == "min_max" and not training:
        return Ends(None)
    if scheme.range == "moving_average" or training:
        return Ends(_AVERAGING)
    return Histogram(scheme.percentile if scheme.range == "percentile" else None)


class Ends:
    """Smallest and largest value, of all batches or averaged over them."""

    def __init__(self, averaging: float | None) -> None:
        self.averaging = averaging
        self.low = self.high = torch.tensor(torch.nan)

    def update(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        if self.low.isnan():
            self.low, self.high = low.clone(), high.clone()
        elif self.averaging is None:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            self.low = torch.lerp(self.low, low, self.averaging)
            self.high = torch.lerp(self.high, high, self.averaging)

    def ends(self, levels: int) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class Histogram:
    """Counts between the smallest and the largest value. percentile: None takes the range of the
    least squared error."""

    def __init__(self, percentile: float | None) -> None:
        self.percentile = percentile
        self.counts, self.low, self.high = torch.zeros(0), 0.0, 0.0

    def update(self, x: Tensor) -> None:
        """Where the range grows, what was counted is counted again at the middles of its bins."""
        low, high = (float(end) for end in torch.aminmax(x))
        if len(self.counts):
            low, high = min(low, self.low), max(high, self.high)
        high = max(high, low + torch.finfo(torch.float32).tiny)
        counts = torch.histc(x.float(), _BINS, low, high)
        if len(self.counts):
            middles = self.low + (torch.arange(_BINS) + 0.5) * (self.high - self.low) / _BINS
            places = ((middles - low) / (high - low) * _BINS).long().clamp(0, _BINS - 1)
            counts.index_add_(0, places, self.counts)
        self.counts, self.low, self.high = counts, low, high

    def ends(self, levels: int) -> tuple[Tensor, Tensor]:
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        if self.percentile is None:
            return squared_error_range(self.counts, low, high, levels)
        return percentile_range(self.counts, low, high, self.percentile)


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
