"""Gates: which differences between baseline and candidate are tolerable, and the verdict.

A gate compares one number with one limit, strictly: a perplexity increase equal to the limit fails.
The number is the difference that was measured (the mission's rule) or, where `gates.confidence` is
set, the end of its interval that looks worst. A candidate whose scores are not finite fails. What
was not measured (a suite that failed, a baseline that is not finite, other documents, too few for
the interval that is asked for) is judged neither way: the verdict is then `error`, and no release
ends with it. Integrity is not a matter of degree and has no limit.

The gate on speed has a limit that must be reached: W4A8 decodes one sequence at least so many times
as fast as BF16, both measured in one process on one device (`dpq_core.benchmark.throughput`).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from dpq_core.evaluation.scores import PERPLEXITIES, PERPLEXITY, PERPLEXITY_WORD, Scores
from dpq_core.recipe import GatesSection
from dpq_core.verdict.halves import ALL
from dpq_core.verdict.pairing import CONFIDENCE, Difference, Evaluation, Failure, difference

MMLU = "mmlu"
COMMONSENSE = (
    "hellaswag",
    "lambada_openai",
    "boolq",
    "arc_easy",
    "piqa",
    "winogrande",
    "arc_challenge",
    "openbookqa",
)

THROUGHPUT_RATIO = "throughput_ratio"  # and, after a dot, the kind of device

_DIGITS = 9  # of a loss that count: 64.1 - 63.6 is half a point, not a hair less


@dataclass(frozen=True)
class Metric(Difference):
    """A difference that was judged. `limit` bounds the loss, in the unit of the gates' mode; of a
    ratio it is what must be reached (None: the metric is shown, not judged). too_few: its documents
    cannot tell a loss of `limit`: that is less than the interval reaches beyond the difference."""

    limit: float | None = None
    passed: bool = False
    too_few: bool = False


@dataclass(frozen=True)
class Verdict:
    """`promoted`, `rejected`, or `inspected` where documents were left out and nothing is broken;
    with every reason and all the numbers. `withheld`: the gates let it pass, the registry not.
    `error`: something was not measured, and nothing is said of the candidate. judged_on: which
    documents."""

    verdict: Literal["promoted", "rejected", "inspected", "withheld", "error"]
    reasons: tuple[str, ...]
    metrics: dict[str, Metric]
    judged_on: str = ALL

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def or_error(self, what: str) -> "Verdict":
        """The same. Raises NotMeasuredError, of `what`, where it is none."""
        if self.verdict != "error":
            return self
        raise NotMeasuredError(
            f"{what} was not measured, so nothing is judged or registered; run again when it can"
            f" be, what is finished is kept: {'; '.join(self.reasons)}"
        )


class NotMeasuredError(RuntimeError):
    """No verdict: for lack of memory, of time, of data, of documents."""


def compare(
    baseline: Evaluation, candidate: Evaluation, confidence: float = CONFIDENCE
) -> dict[str, Difference]:
    """All differences by the metric's name: perplexities, the suites' plain mean, each suite.

    The mean is over the suites of accuracy but MMLU. It is called `commonsense_accuracy` where
    these are the eight of the literature, else `accuracy_average`.
    """
    names = list(dict.fromkeys([*baseline, *candidate]))
    rolling = [
        name
        for name in names
        for scores in (baseline.get(name), candidate.get(name))
        if isinstance(scores, Scores) and scores.metric == PERPLEXITY_WORD
    ]
    averaged = [name for name in names if name not in (PERPLEXITY, MMLU, *rolling)]
    named: dict[str, list[str]] = {}
    if PERPLEXITY in names:
        named[PERPLEXITY] = [PERPLEXITY]
    if averaged:
        named[average_name(averaged)] = averaged
    for name in names:
        if name in rolling:
            named[PERPLEXITY_WORD if name == "wikitext" else f"{PERPLEXITY_WORD}.{name}"] = [name]
        elif name != PERPLEXITY:
            named[f"accuracy.{name}"] = [name]
    return {
        metric: difference(baseline, candidate, suites, confidence)
        for metric, suites in named.items()
    }


def average_name(suites: list[str]) -> str:
    """What the plain mean over these suites is called."""
    return "commonsense_accuracy" if set(suites) == set(COMMONSENSE) else "accuracy_average"


def judge(
    differences: Mapping[str, Difference],
    integrity: Mapping[str, str | None],
    gates: GatesSection,
    limited: str | None,
    ratios: Mapping[str, float | Failure] | None = None,
    judged_on: str = ALL,
) -> Verdict:
    """Apply the gates.

    Args:
        differences: as `compare` gives them.
        integrity: check name → None where it passed, else what is wrong.
        limited: the setting that left documents out of the evaluation, if any did.
        ratios: by kind of device, decoding speed of W4A8 over BF16, or why it is missing; None
            where speed is not judged (yet).
        judged_on: which documents the differences are of.
    """
    metrics = {name: _judged(name, d, gates) for name, d in differences.items()}
    if ratios is not None:
        metrics |= _judged_ratios(ratios, gates.throughput_ratio)
    missing = _missing(metrics, gates)
    if not any(metric.limit is not None for metric in metrics.values()):
        missing.append("nothing was measured that a gate could judge")
    if missing:
        return Verdict("error", tuple(missing), metrics, judged_on)
    reasons = [f"integrity: {name}: {wrong}" for name, wrong in integrity.items() if wrong]
    reasons += [_reason(name, m, gates) for name, m in metrics.items() if not m.passed]
    broken = any(integrity.values()) or any(metric.wrong for metric in metrics.values())
    if limited and not gates.allow_limited:
        reasons.append(
            f"{limited} left documents out: such a run is for looking, not for promotion "
            "(unless gates.allow_limited is set)"
        )
        looked_at = Verdict("inspected", tuple(reasons), metrics, judged_on)
        return replace(looked_at, verdict="rejected") if broken else looked_at
    return Verdict("rejected" if reasons else "promoted", tuple(reasons), metrics, judged_on)


def _missing(metrics: Mapping[str, Metric], gates: GatesSection) -> list[str]:
    """What was not measured, and why; of an average only where no suite of it says so."""
    said = {name: _reason(name, m, gates) for name, m in metrics.items() if m.unmeasured}
    single = [reason for name, reason in said.items() if name not in _AVERAGES]
    return single or list(said.values())


ACCURACY = "accuracy"  # of a model that has one test set
_AVERAGES = ("commonsense_accuracy", "accuracy_average", ACCURACY)


def ratio_metric(metric: str, found: float | Failure, limit: float | None) -> Metric:
    """A ratio to the baseline, which must reach `limit`; what is missing or not finite does not."""
    if isinstance(found, Failure):
        return Metric(metric, limit=limit, wrong=found.reason, unmeasured=limit is not None)
    if not math.isfinite(found):
        return Metric(metric, limit=limit, wrong=f"it is {found}")
    passed = limit is None or found >= limit
    return Metric(metric, 1.0, found, found - 1, limit=limit, passed=passed)


def _judged_ratios(ratios: Mapping[str, float | Failure], limit: float | None) -> dict[str, Metric]:
    """A metric a device. What nobody asked for and is not there is no metric."""
    if limit is not None and not ratios:
        wrong = "not measured"
        return {THROUGHPUT_RATIO: Metric(_DECODING, limit=limit, wrong=wrong, unmeasured=True)}
    return {
        f"{THROUGHPUT_RATIO}.{device}": ratio_metric(_DECODING, found, limit)
        for device, found in ratios.items()
        if limit is not None or not isinstance(found, Failure)
    }


_DECODING = "decoding, batch 1, W4A8 / BF16"


def _limit(name: str, gates: GatesSection) -> float | None:
    if name == PERPLEXITY:
        return gates.perplexity_increase
    if name in (*_AVERAGES, f"accuracy.{MMLU}"):
        return gates.accuracy_drop
    return None


def _judged(name: str, found: Difference, gates: GatesSection) -> Metric:
    base = {field.name: getattr(found, field.name) for field in fields(found)}
    limit = _limit(name, gates)
    if found.wrong or found.delta is None or found.baseline is None:
        return Metric(**base, limit=limit, passed=False)
    if limit is None:
        return Metric(**base, passed=True)
    loss, worst = _loss(found, gates)
    judged = loss if gates.confidence is None else worst
    base["unmeasured"] = judged is None
    return Metric(
        **base,
        limit=limit,
        passed=judged is not None and round(judged, _DIGITS) < limit,
        too_few=worst is None or worst - loss > limit,
    )


def _loss(found: Difference, gates: GatesSection) -> tuple[float, float | None]:
    """The loss, and the worst that the interval holds: positive is worse; points, or percent of
    the baseline."""
    assert found.delta is not None
    assert found.baseline is not None
    sign = 1 if found.metric in PERPLEXITIES else -1
    unit = 1.0 if gates.mode == "absolute" else 100 / found.baseline if found.baseline else math.inf
    ends = None if found.interval is None else [sign * unit * end for end in found.interval]
    return sign * unit * found.delta, None if ends is None else max(ends)


def _reason(name: str, metric: Metric, gates: GatesSection) -> str:
    if metric.wrong:
        return f"{name}: {metric.wrong}"
    if metric.metric == _DECODING:
        return f"{name}: {metric.candidate:.4g} does not reach the limit of {metric.limit:g}"
    perplexity = metric.metric in PERPLEXITIES
    unit = "%" if gates.mode == "relative" else "" if perplexity else " points"
    change = (
        f"{name}: {'increase' if perplexity else 'drop'} from {metric.baseline:.4f} to "
        f"{metric.candidate:.4f} ({metric.delta:+.4f})"
    )
    limit = f"the limit of {metric.limit:g}{unit}"
    if gates.confidence is None:
        return f"{change} is not below {limit}"
    if metric.interval is None:
        return f"{change}: too few windows for the interval that gates.confidence asks for"
    low, high = metric.interval
    return f"{change}, {gates.confidence:.0%} interval {low:+.4f} to {high:+.4f}: reaches {limit}"
