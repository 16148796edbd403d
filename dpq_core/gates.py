"""Gates: which differences between baseline and candidate are tolerable, and the verdict.

A gate compares one number with one limit, strictly: a perplexity increase equal to the limit fails.
What is missing or not finite fails. Integrity is not a matter of degree and has no limit.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dpq_core.recipe import GatesSection

PERPLEXITY = "perplexity_token"
ACCURACY = "accuracy_average"  # plain average of the recipe's suites but MMLU
MMLU = "accuracy.mmlu"

_DIGITS = 9  # of a loss that count: 64.1 - 63.6 is half a point, not a hair less


@dataclass(frozen=True)
class Metric:
    """One measured pair. `delta` is candidate minus baseline; `limit` bounds the loss (None: the
    metric is shown, not judged); accuracies in percent."""

    baseline: float | None
    candidate: float | None
    delta: float | None
    limit: float | None
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """`promoted` or `rejected`, with every reason and all the numbers."""

    verdict: Literal["promoted", "rejected"]
    reasons: tuple[str, ...]
    metrics: dict[str, Metric]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    baseline: Mapping[str, float | None],
    candidate: Mapping[str, float | None],
    integrity: Mapping[str, str | None],
    gates: GatesSection,
    limited: bool,
) -> Verdict:
    """Apply the gates.

    Args:
        baseline, candidate: metric name → value; `PERPLEXITY`, `ACCURACY` and `MMLU` are judged.
        integrity: check name → None where it passed, else what is wrong.
        limited: whether documents were left out of the evaluation.
    """
    limits = {
        PERPLEXITY: gates.perplexity_increase,
        ACCURACY: gates.accuracy_drop,
        MMLU: gates.accuracy_drop,
    }
    names = list(dict.fromkeys([*baseline, *candidate]))
    metrics = {
        name: _metric(baseline.get(name), candidate.get(name), limits.get(name), gates, name)
        for name in names
    }
    reasons = [f"integrity: {name}: {wrong}" for name, wrong in integrity.items() if wrong]
    failed = {name: metric for name, metric in metrics.items() if not metric.passed}
    reasons += [_reason(name, metric, gates) for name, metric in failed.items()]
    if not any(name in limits for name in metrics):
        reasons.append("nothing was measured that a gate could judge")
    if limited and not gates.allow_limited:
        reasons.append(
            "evaluation.limit left documents out: such a run is for looking, not for promotion "
            "(unless gates.allow_limited is set)"
        )
    return Verdict("rejected" if reasons else "promoted", tuple(reasons), metrics)


def _metric(
    baseline: float | None,
    candidate: float | None,
    limit: float | None,
    gates: GatesSection,
    name: str,
) -> Metric:
    known = [v if v is not None and math.isfinite(v) else None for v in (baseline, candidate)]
    before, after = known
    if before is None or after is None:
        return Metric(before, after, None, limit, passed=limit is None)
    delta = after - before
    if limit is None:
        return Metric(before, after, delta, None, passed=True)
    loss = delta if name == PERPLEXITY else -delta
    if gates.mode == "relative":
        loss = 100 * loss / before if before else math.inf
    return Metric(before, after, delta, limit, passed=round(loss, _DIGITS) < limit)


def _reason(name: str, metric: Metric, gates: GatesSection) -> str:
    missing = [side for side in ("baseline", "candidate") if getattr(metric, side) is None]
    if missing:
        return f"{name}: {' and '.join(missing)} missing or not finite"
    relative = gates.mode == "relative"
    if name == PERPLEXITY:
        what, unit = "increase", "%" if relative else ""
    else:
        what, unit = "drop", "%" if relative else " points"
    return (
        f"{name}: {what} from {metric.baseline:.4f} to {metric.candidate:.4f} "
        f"({metric.delta:+.4f}) is not below the limit of {metric.limit:g}{unit}"
    )
