"""The percentile bootstrap (Efron, 1979) of sums over windows, and the ends of an interval.

A resample draws as many windows as there are, with replacement; the same windows count for every
column, so that both models are drawn on the same text.
"""

import numpy as np
from numpy.typing import NDArray

SEED = 0  # of the bootstrap
RESAMPLES = 10_000
FEWEST = 10  # windows: fewer say nothing of their own spread

_AT_ONCE = 500  # resamples of windows: their counts take _AT_ONCE × windows × 8 bytes


def resampled_sums(
    columns: NDArray[np.float64],  # [windows, columns]
) -> NDArray[np.float64]:
    """[RESAMPLES, columns]: the columns' sums over the windows of each resample."""
    count = len(columns)
    rng = np.random.default_rng(SEED)
    even = np.full(count, 1 / count)
    return np.concatenate(
        [
            rng.multinomial(count, even, size=_AT_ONCE) @ columns
            for _ in range(RESAMPLES // _AT_ONCE)
        ]
    )


def ends(drawn: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Of the interval that holds this share of what was drawn, the tails being equal."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
