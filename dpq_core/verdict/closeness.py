"""How close two models' predictions are: KL in nats a token and agreement, with intervals.

    divergence                 the mean over tokens; .median, .p99, .p99_9, .max: of single tokens
    top1_agreement             share of tokens of which both think the same most likely

Windows are resampled, as perplexity's are. A resample's quantile is the smallest of some hundred
values, dense near the measured one, below which the resample has enough tokens: its interval's ends
are known to some percent of their distance from the middle. A maximum has no interval: no resample
can be above it.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dpq_core.evaluation.text_divergence import DIVERGENCE, TextDivergence
from dpq_core.verdict.pairing import Difference, Failure
from dpq_core.verdict.resampling import FEWEST, ends, resampled_sums

TOP1 = "top1_agreement"
NATS, SHARE = "nats a token", "share of tokens"
CLOSE = {DIVERGENCE: NATS, TOP1: SHARE}  # what gates can judge, and its unit
QUANTILES: Mapping[str, float] = {"median": 0.5, "p99": 0.99, "p99_9": 0.999, "max": 1.0}

_VALUES = 256  # on each side of a quantile


def closeness(found: TextDivergence | Failure, confidence: float) -> dict[str, Difference]:
    """What was measured, by name, as differences from a model that is the same: 0 nats, a share of
    1. Tokens whose divergence is not finite leave no number but the reason."""
    if isinstance(found, Failure):
        return {n: Difference(m, wrong=found.reason, unmeasured=True) for n, m in CLOSE.items()}
    count = len(found.windows)
    nats = found.nats.astype(np.float64)
    if broken := int((~np.isfinite(nats)).sum()):
        wrong = f"candidate: the divergence of {broken:,} of {nats.size:,} tokens is not finite"
        return {name: Difference(metric, wrong=wrong) for name, metric in CLOSE.items()}
    if not nats.size:
        return closeness(Failure("no windows"), confidence)
    means = np.stack([nats.mean(1), found.agree.mean(1)], axis=1)  # [windows, 2]
    mean, agreement = (float(value) for value in means.mean(0))
    intervals: list[tuple[float, float] | None] = [None, None]
    if count >= FEWEST:
        drawn = resampled_sums(means) / count
        intervals = [ends(drawn[:, 0], confidence), ends(drawn[:, 1] - 1, confidence)]
    measured = {DIVERGENCE: Difference(NATS, 0.0, mean, mean, intervals[0], count)}
    for name, share in QUANTILES.items():
        value = float(np.quantile(nats, share, method="inverted_cdf"))
        interval = _quantile_interval(nats, share, confidence) if count >= FEWEST else None
        measured[f"{DIVERGENCE}.{name}"] = Difference(NATS, 0.0, value, value, interval, count)
    lost = agreement - 1
    return measured | {TOP1: Difference(SHARE, 1.0, agreement, lost, intervals[1], count)}


def _quantile_interval(
    nats: NDArray[np.float64],  # [windows, tokens]
    share: float,
    confidence: float,
) -> tuple[float, float] | None:
    if share == 1:
        return None
    windows, tokens = nats.shape
    ordered = np.sort(nats, axis=None)
    middle = int(share * ordered.size)
    away = np.unique(np.geomspace(1, ordered.size, _VALUES).astype(int))
    places = np.concatenate([middle - away, [middle], middle + away])
    values = np.unique(ordered[np.clip(places, 0, ordered.size - 1)])
    # How many tokens of each window are at most each of the values: [windows, values].
    which = np.searchsorted(values, nats) + len(values) * np.arange(windows)[:, None]
    counted = np.bincount(which.ravel(), minlength=windows * len(values))
    below = counted.reshape(windows, -1).cumsum(1).astype(np.float64)
    enough = resampled_sums(below) >= share * windows * tokens
    return ends(values[enough.argmax(1)], confidence)
