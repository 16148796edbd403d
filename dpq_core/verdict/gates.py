"""Gates: which differences between baseline and candidate are tolerable, and the verdict.

A gate compares one number with one limit, strictly: a perplexity increase equal to the limit fails.
What comes of it is one of three words (`dpq_core.verdict.standing`): *shown*, *not shown*,
*failed*. The difference that was measured decides (the mission's rule), so that what is not shown
passes; with `gates.confidence` it does not. A candidate whose scores are not finite fails. What was
not measured (a suite that failed, a baseline that is not finite, other documents, too few for the
interval that is asked for) is judged neither way: the verdict is then `error`, and no release ends
with it. Integrity is not a matter of degree and has no limit.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dpq_core.recipe import GatesSection
from dpq_core.verdict.closeness import CLOSE
from dpq_core.verdict.flips import FLIPS, OF_ANSWERS
from dpq_core.verdict.halves import ALL
from dpq_core.verdict.pairing import Difference, Failure
from dpq_core.verdict.ratios import THROUGHPUT_RATIO, judged_ratios, ratio_reason
from dpq_core.verdict.standing import AVERAGES, Metric, judged_metric, reason


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
    metrics = {name: judged_metric(name, d, gates) for name, d in differences.items()}
    metrics = {n: m for n, m in metrics.items() if m.limit is not None or not _is_beside(n, m)}
    metrics |= _not_measured(metrics, gates)
    if ratios is not None:
        metrics |= judged_ratios(ratios, gates.throughput_ratio)
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
    single = [why for name, why in said.items() if name not in AVERAGES]
    return single or list(said.values())


def _is_beside(name: str, metric: Metric) -> bool:
    """Whether it says only again, or of what nobody asked for, that something is missing."""
    return bool(metric.wrong) and (name.startswith(FLIPS) or (name in CLOSE and metric.unmeasured))


def _not_measured(metrics: Mapping[str, Metric], gates: GatesSection) -> dict[str, Metric]:
    """What an explicit gate asks for, where nothing was measured that it could judge."""
    missing = {**CLOSE, FLIPS: OF_ANSWERS}
    if any(name.startswith(FLIPS) for name in metrics):  # of MMLU alone, perhaps
        del missing[FLIPS]
    nothing = {
        name: Difference(m, wrong="not measured", unmeasured=True)
        for name, m in missing.items()
        if name not in metrics
    }
    judged = {name: judged_metric(name, found, gates) for name, found in nothing.items()}
    return {name: metric for name, metric in judged.items() if metric.limit is not None}


def _reason(name: str, metric: Metric, gates: GatesSection) -> str:
    ratio = name.startswith(THROUGHPUT_RATIO)
    return ratio_reason(name, metric) if ratio else reason(name, metric, gates)
