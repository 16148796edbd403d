"""Two models on the same documents: the difference, and how sure it is.

A quantized model answers most questions as its original does, so the difference is known far better
than either accuracy (at 7 billion parameters the eight-suite mean of one model has a standard error
of 0.44 points). Documents are paired; what counts is those whose answer turned.

- Interval: percentile bootstrap over documents (Efron, 1979), suites resampled apart. A document's
  change is −1, 0 or 1, so a resample is one multinomial draw of three counts; half an answer is
  added to those that turned right and to those that turned wrong (Agresti and Min, 2005), without
  which ten documents that agree would look certain.
- p: of the same mean over suites. Were both models equally good, each turned answer could as well
  have turned the other way (Fisher's sign flips, suites apart); p is how often the mean then moves
  at least so far. For one suite that is McNemar's exact test (1947).
- Perplexity: windows are resampled, the same ones for both models.

Nothing is averaged over: a suite that failed, a document that one of the two lacks, or a value that
is not finite leaves no number but the reason. Scores of the candidate that are not finite are what
was measured of it; every other reason means that nothing was (`unmeasured`).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpq_core.evaluation.scores import ACCURACIES, Scores
from dpq_core.verdict.resampling import FEWEST, RESAMPLES, SEED, ends, resampled_sums

CONFIDENCE = 0.95

_ROUNDING = 1e-9  # points: of sums that are equal


@dataclass(frozen=True)
class Failure:
    """Why there are no scores."""

    reason: str


class _NotFinite(Failure):
    """There are, of the candidate, and not all are numbers."""


Evaluation = Mapping[str, Scores | Failure]  # by suite, or perplexity_token


@dataclass(frozen=True)
class Difference:
    """One number of both models. `delta` is candidate minus baseline, accuracies in percent."""

    metric: str  # of `dpq_core.evaluation.scores`; several where suites are averaged
    baseline: float | None = None
    candidate: float | None = None
    delta: float | None = None
    interval: tuple[float, float] | None = None  # of delta
    documents: int = 0
    truncated: int = 0  # requests that were cut to the model's window
    turned_right: int | None = None
    turned_wrong: int | None = None
    p_value: float | None = None
    turned_other: int | None = None  # wrong → another wrong; None where choices were not kept
    margin: float | None = None  # nats: median of the baseline's margins; see `verdict.flips`
    margin_candidate: float | None = None
    margin_turned: float | None = None  # of the baseline's, where the answer changed
    wrong: str | None = None  # why delta is missing
    unmeasured: bool = False  # not for what the candidate's scores are: nothing can be judged


def difference(
    baseline: Evaluation,
    candidate: Evaluation,
    suites: Sequence[str],
    confidence: float = CONFIDENCE,
) -> Difference:
    """The difference on one suite, or in the plain mean over several suites of accuracies.

    `interval` is None for fewer than ten windows.
    """
    missing = Failure("not measured")
    before = [baseline.get(suite, missing) for suite in suites]
    after = [candidate.get(suite, missing) for suite in suites]
    metric = ", ".join(sorted({s.metric for s in before + after if isinstance(s, Scores)}))
    values = _mean(before), _mean(after)
    pairs, reasons, unmeasured = [], [], False
    for suite, first, second in zip(suites, before, after, strict=True):
        if found := _unpaired(first, second):
            reasons.append(f"{suite}: {found.reason}" if len(suites) > 1 else found.reason)
            unmeasured |= not isinstance(found, _NotFinite)
        elif isinstance(first, Scores) and isinstance(second, Scores):
            pairs.append((first, second))
    if reasons or values[0] is None or values[1] is None:
        unmeasured |= not reasons and values[0] is None  # the baseline's sum overflows
        wrong = "; ".join(reasons) or f"{'baseline' if values[0] is None else 'candidate'} infinite"
        return Difference(metric, *values, wrong=wrong, unmeasured=unmeasured)
    paired = Difference(
        metric,
        *values,
        values[1] - values[0],
        documents=sum(len(first) for first, _ in pairs),
        truncated=sum(first.truncated for first, _ in pairs),
    )
    if metric in ACCURACIES or len(suites) > 1:
        return _with_turned_answers(paired, pairs, confidence)
    return replace(paired, interval=_perplexity_interval(*pairs[0], confidence))


def breakdown(baseline: Scores, candidate: Scores) -> list[dict[str, str | int | float]]:
    """A row for each category and then for each part of a suite (MMLU's 57 subjects), in percent;
    nothing for a suite of one part.

    The two must have the same documents.
    """
    if len(set(baseline.parts)) < 2:
        return []
    rows: list[dict[str, str | int | float]] = []
    for level, labels in (("category", baseline.groups), ("subject", baseline.parts)):
        places: dict[str, list[int]] = {}
        for place, label in enumerate(labels):
            places.setdefault(label, []).append(place)
        for label, chosen in places.items():
            values = [[scores.values[i] for i in chosen] for scores in (baseline, candidate)]
            before, after = (100 * sum(column) / len(chosen) for column in values)
            changes = [after - before for before, after in zip(*values, strict=True)]
            rows.append(
                {
                    "level": level,
                    "name": label,
                    "documents": len(chosen),
                    "baseline": before,
                    "candidate": after,
                    "delta": after - before,
                    "turned right": sum(change > 0 for change in changes),
                    "turned wrong": sum(change < 0 for change in changes),
                }
            )
    return rows


def _mean(scores: Sequence[Scores | Failure]) -> float | None:
    values = [s.value for s in scores if isinstance(s, Scores)]
    if len(values) < len(scores) or not all(math.isfinite(value) for value in values):
        return None
    return sum(values) / len(values)


def _unpaired(before: Scores | Failure, after: Scores | Failure) -> Failure | None:
    """Why two results cannot be compared document by document."""
    if isinstance(before, Failure):
        return Failure(f"baseline {before.reason}")
    if isinstance(after, Failure):
        return Failure(f"candidate {after.reason}")
    if broken := _not_finite(before):
        return Failure(f"baseline: {broken}")
    if before.metric != after.metric:
        return Failure(f"baseline has {before.metric}, candidate {after.metric}")
    if before.documents != after.documents or before.weights != after.weights:
        first, second = Counter(before.documents), Counter(after.documents)
        return Failure(
            f"not the same documents: {(first - second).total()} of the baseline's are missing from"
            f" the candidate's, {(second - first).total()} of the candidate's from the baseline's"
        )
    if not before.documents:
        return Failure("no documents")
    broken = _not_finite(after)
    return _NotFinite(f"candidate: {broken}") if broken else None


def _not_finite(scores: Scores) -> str:
    broken = sum(not math.isfinite(value) for value in scores.values)
    return f"the scores of {broken} of {len(scores)} documents are not finite" if broken else ""


def _with_turned_answers(
    paired: Difference, pairs: Sequence[tuple[Scores, Scores]], confidence: float
) -> Difference:
    rng = np.random.default_rng(SEED)
    deltas, flipped = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    right = wrong = 0
    for before, after in pairs:
        changes = np.subtract(after.values, before.values)
        counts = [int((changes == change).sum()) for change in (-1, 0, 1)]
        shares = np.add(counts, [0.5, 0, 0.5]) / (len(changes) + 1)
        draws = rng.multinomial(len(changes), shares, size=RESAMPLES)
        deltas += 100 * (draws[:, 2] - draws[:, 0]) / len(changes) / len(pairs)
        wrong, right = wrong + counts[0], right + counts[2]
        turned = counts[0] + counts[2]
        flips = 2 * rng.binomial(turned, 0.5, size=RESAMPLES) - turned
        flipped += 100 * flips / len(changes) / len(pairs)
    return replace(
        paired,
        interval=ends(deltas, confidence),
        turned_right=right,
        turned_wrong=wrong,
        p_value=_exact_p(right, wrong) if len(pairs) == 1 else _flipped_p(flipped, paired.delta),
    )


def _exact_p(right: int, wrong: int) -> float:
    """McNemar's, two-sided: of `right + wrong` fair coins."""
    from scipy.stats import binomtest  # seconds

    return float(binomtest(right, right + wrong).pvalue) if right + wrong else 1.0


def _flipped_p(flipped: NDArray[np.float64], delta: float | None) -> float:
    """Share of flips that move the mean at least as far; the answers as they are count as one."""
    assert delta is not None
    far = np.abs(flipped) >= abs(delta) - _ROUNDING
    return float((1 + far.sum()) / (1 + len(flipped)))


def _perplexity_interval(
    before: Scores, after: Scores, confidence: float
) -> tuple[float, float] | None:
    if len(before) < FEWEST:
        return None
    columns = np.stack([before.values, after.values, before.weights], axis=1)  # [windows, 3]
    sums = resampled_sums(columns)
    with np.errstate(over="ignore"):
        deltas = np.exp(sums[:, 1] / sums[:, 2]) - np.exp(sums[:, 0] / sums[:, 2])
    return ends(deltas, confidence)
