"""Ratios to the baseline that must reach a limit: of speed and size. They have no interval.

The gate on speed: W4A8 decodes one sequence at least so many times as fast as BF16, both measured
in one process on one device (`dpq_core.benchmark.throughput`).
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from dpq_core.verdict.pairing import Failure
from dpq_core.verdict.standing import Metric

THROUGHPUT_RATIO = "throughput_ratio"  # and, after a dot, the kind of device

_DECODING = "decoding, batch 1, W4A8 / BF16"


def ratio_metric(metric: str, found: float | Failure, limit: float | None) -> Metric:
    """A ratio to the baseline, which must reach `limit`; what is missing or not finite does not."""
    judged = Metric(metric, limit=limit, standing=None if limit is None else "failed")
    if isinstance(found, Failure):
        return replace(judged, wrong=found.reason, unmeasured=limit is not None)
    if not math.isfinite(found):
        return replace(judged, wrong=f"it is {found}")
    judged = replace(judged, baseline=1.0, candidate=found, delta=found - 1)
    if limit is None:
        return replace(judged, passed=True)
    return replace(judged, passed=True, standing="shown") if found >= limit else judged


def judged_ratios(ratios: Mapping[str, float | Failure], limit: float | None) -> dict[str, Metric]:
    """A metric a device. What nobody asked for and is not there is no metric."""
    if limit is not None and not ratios:
        return {THROUGHPUT_RATIO: ratio_metric(_DECODING, Failure("not measured"), limit)}
    return {
        f"{THROUGHPUT_RATIO}.{device}": ratio_metric(_DECODING, found, limit)
        for device, found in ratios.items()
        if limit is not None or not isinstance(found, Failure)
    }


def ratio_reason(name: str, metric: Metric) -> str:
    """Why it does not pass."""
    if metric.wrong:
        return f"{name}: {metric.wrong}"
    return f"{name}: {metric.candidate:.4g} does not reach the limit of {metric.limit:g}"
