"""Answers that changed, both ways: what an accuracy hides, as they cancel in it.

    right → wrong, wrong → right, wrong → another wrong        "flips" of all three kinds

(Dutta et al., Accuracy is Not All You Need, 2024, whose flips are the first two; what is chosen
tells the third.) Flips are the percentage of documents whose answer is another one, in the plain
mean over suites. Where a suite keeps no choices (LAMBADA: the next word is right or it is not), the
third kind is not seen.

A document's margin is the log-likelihood of the choice above that of the next, normalised as the
suite's metric does. An answer that flips at a small margin was nearly a tie; one at a large margin
was known, and is not any more.

The interval is the percentile bootstrap over documents, suites apart: a binomial draw of those that
changed, half a document added to them and to those that did not (`dpq_core.verdict.pairing`).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dpq_core.evaluation.scores import Scores
from dpq_core.verdict.pairing import Difference
from dpq_core.verdict.resampling import RESAMPLES, SEED, ends

FLIPS = "flips"
OF_ANSWERS = "percent of answers"

Pairs = Sequence[tuple[Scores, Scores]]  # both models' scores of a suite, same documents


def flips(pairs: Pairs, confidence: float) -> Difference:
    """The percentage of answers that changed, as a difference from a model that changes none."""
    rng = np.random.default_rng(SEED)
    drawn, found = np.zeros(RESAMPLES), 0.0
    for before, after in pairs:
        count, changed = len(before), int(_changed(before, after).sum())
        found += 100 * changed / count / len(pairs)
        share = (changed + 0.5) / (count + 1)
        drawn += 100 * rng.binomial(count, share, RESAMPLES) / count / len(pairs)
    documents = sum(len(before) for before, _ in pairs)
    return Difference(OF_ANSWERS, 0.0, found, found, ends(drawn, confidence), documents)


def with_choices(paired: Difference, pairs: Pairs) -> Difference:
    """The difference with wrong answers that became another wrong one, and with the medians of
    margins; as it is where a suite of it keeps no choices."""
    if not all(before.picks and after.picks for before, after in pairs):
        return paired
    changed = [_changed(before, after) for before, after in pairs]
    both = [_both_wrong(before, after) for before, after in pairs]
    other = sum(int((c & b).sum()) for c, b in zip(changed, both, strict=True))
    known = np.concatenate([np.asarray(before.margins) for before, _ in pairs])
    candidate = np.concatenate([np.asarray(after.margins) for _, after in pairs])
    return replace(
        paired,
        turned_other=other,
        margin=_median(known),
        margin_candidate=_median(candidate),
        margin_turned=_median(known[np.concatenate(changed)]),
    )


def _changed(before: Scores, after: Scores) -> NDArray[np.bool_]:
    turned = np.not_equal(before.values, after.values)
    if before.picks and after.picks:
        turned |= _both_wrong(before, after) & np.not_equal(before.picks, after.picks)
    return turned


def _both_wrong(before: Scores, after: Scores) -> NDArray[np.bool_]:
    return np.equal(before.values, 0) & np.equal(after.values, 0)


def _median(margins: NDArray[np.float64]) -> float | None:
    """None of none."""
    return float(np.median(margins)) if len(margins) else None
