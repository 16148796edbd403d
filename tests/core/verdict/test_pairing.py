"""Paired differences against SciPy's bootstrap, and against arithmetic by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpq_core.evaluation.scores import PERPLEXITY, Scores, load_scores, save_scores
from dpq_core.verdict.pairing import breakdown, difference


def scores(values, metric="acc", weights=None, parts=None, groups=None):
    count = len(values)
    return Scores(
        metric=metric,
        documents=[str(place) for place in range(count)],
        parts=parts or ["suite"] * count,
        groups=groups or [""] * count,
        values=[float(value) for value in values],
        weights=weights or [1.0] * count,
    )


def answers(right, wrong, kept_right, kept_wrong):
    """Baseline and candidate with so many answers turned right, turned wrong, kept."""
    before = [0] * right + [1] * wrong + [1] * kept_right + [0] * kept_wrong
    after = [1] * right + [0] * wrong + [1] * kept_right + [0] * kept_wrong
    return scores(before), scores(after)


def of_pair(before, after, **keywords):
    return difference({"suite": before}, {"suite": after}, ["suite"], **keywords)


def test_turned_answers_and_mcnemar_by_hand():
    found = of_pair(*answers(right=3, wrong=9, kept_right=50, kept_wrong=38))
    assert (found.turned_right, found.turned_wrong, found.documents) == (3, 9, 100)
    assert (found.baseline, found.candidate, found.delta) == (59, 53, -6)
    tail = sum(math.comb(12, k) for k in range(4)) / 2**12
    assert found.p_value == pytest.approx(2 * tail)
    assert found.metric == "acc"


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_accuracy_interval_is_the_bootstrap_s(confidence):
    before, after = answers(right=120, wrong=160, kept_right=1000, kept_wrong=720)
    changes = np.subtract(after.values, before.values)
    reference = stats.bootstrap(
        (changes,),
        np.mean,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(1),
        batch=100,
    ).confidence_interval
    interval = of_pair(before, after, confidence=confidence).interval
    assert interval == pytest.approx((100 * reference.low, 100 * reference.high), abs=0.08)


def mean_of(first, second):
    return difference({"a": first[0], "b": second[0]}, {"a": first[1], "b": second[1]}, ["a", "b"])


def test_p_is_of_the_mean_over_suites_and_not_of_the_pooled_documents():
    """Pooled, 60 answers turned right and 100 wrong say that it is worse (p 0.002). The mean of the
    suites, which the gate judges, rose."""
    small = answers(right=40, wrong=10, kept_right=75, kept_wrong=75)
    large = answers(right=20, wrong=90, kept_right=5000, kept_wrong=4890)
    found = mean_of(small, large)
    assert found.delta == pytest.approx((15 - 0.7) / 2)
    assert (found.turned_right, found.turned_wrong) == (60, 100)
    spread = 50 * math.sqrt(50 / 200**2 + 110 / 10_000**2)  # of fair coins, in points
    tail = stats.norm.sf(abs(found.delta) / spread)
    assert found.p_value == pytest.approx(2 * tail, abs=2e-4)
    assert found.interval[0] > 0
    assert mean_of(tuple(reversed(small)), tuple(reversed(large))).p_value == found.p_value


def test_p_of_a_mean_that_did_not_move_is_1():
    small = answers(right=1, wrong=2, kept_right=50, kept_wrong=47)
    large = answers(right=20, wrong=10, kept_right=500, kept_wrong=470)
    found = mean_of(small, large)
    assert found.delta == pytest.approx(0)
    assert found.p_value == 1


def test_mean_of_suites_resamples_each_apart():
    first = answers(right=30, wrong=10, kept_right=100, kept_wrong=60)
    second = answers(right=5, wrong=45, kept_right=400, kept_wrong=550)
    found = difference({"a": first[0], "b": second[0]}, {"a": first[1], "b": second[1]}, ["a", "b"])
    assert found.delta == pytest.approx((10 - 4) / 2)
    assert (found.turned_right, found.turned_wrong, found.documents) == (35, 55, 1200)
    reference = stats.bootstrap(
        tuple(np.subtract(after.values, before.values) for before, after in (first, second)),
        lambda a, b, axis: (a.mean(axis) + b.mean(axis)) / 2,
        method="percentile",
        rng=np.random.default_rng(1),
        batch=100,
    ).confidence_interval
    assert found.interval == pytest.approx((100 * reference.low, 100 * reference.high), abs=0.15)


def test_perplexity_interval_is_the_paired_bootstrap_s():
    rng = np.random.default_rng(0)
    weights = rng.integers(50, 200, 80).astype(float)
    before = weights * rng.normal(2, 0.2, 80)
    after = before + weights * rng.normal(0.01, 0.02, 80)
    found = of_pair(*(scores(list(nats), PERPLEXITY, list(weights)) for nats in (before, after)))
    assert found.delta == pytest.approx(
        math.exp(after.sum() / weights.sum()) - math.exp(before.sum() / weights.sum())
    )

    def increase(b, a, w, axis):
        return np.exp(a.sum(axis) / w.sum(axis)) - np.exp(b.sum(axis) / w.sum(axis))

    reference = stats.bootstrap(
        (before, after, weights),
        increase,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = reference.high - reference.low
    assert found.interval == pytest.approx((reference.low, reference.high), abs=0.1 * width)
    assert found.turned_right is None


@pytest.mark.parametrize(("documents", "at_least"), [(10, 5), (100, 0.9), (10_000, 0)])
def test_agreement_of_few_documents_is_not_certainty(documents, at_least):
    found = of_pair(*answers(right=0, wrong=0, kept_right=documents, kept_wrong=0))
    assert found.delta == 0
    assert found.p_value == 1
    assert found.interval[0] <= -at_least
    assert found.interval[1] >= at_least
    assert max(map(abs, found.interval)) <= 200 / documents


def test_few_windows_have_no_interval():
    nine, ten = (scores([2.0] * count, PERPLEXITY) for count in (9, 10))
    assert of_pair(nine, nine).interval is None
    assert of_pair(ten, ten).interval == (0, 0)


counts = st.integers(0, 60)


@given(right=counts, wrong=counts, kept=st.integers(1, 300))
@settings(deadline=None, max_examples=60)
def test_exchanging_the_models_mirrors_the_difference(right, wrong, kept):
    before, after = answers(right, wrong, kept, kept)
    forth, back = of_pair(before, after), of_pair(after, before)
    assert forth.delta == -back.delta
    assert forth.p_value == pytest.approx(back.p_value)
    assert (forth.turned_right, forth.turned_wrong) == (back.turned_wrong, back.turned_right)
    assert forth.interval[0] <= forth.delta <= forth.interval[1]
    assert forth == of_pair(before, after)  # the same numbers whenever it is asked


def test_breakdown_by_category_and_subject():
    parts = ["law", "law", "physics", "physics", "physics"]
    groups = ["humanities", "humanities", "stem", "stem", "stem"]
    rows = breakdown(
        scores([1, 0, 1, 1, 0], parts=parts, groups=groups),
        scores([1, 1, 0, 1, 0], parts=parts, groups=groups),
    )
    assert [(row["level"], row["name"]) for row in rows] == [
        ("category", "humanities"),
        ("category", "stem"),
        ("subject", "law"),
        ("subject", "physics"),
    ]
    assert rows[0]["delta"] == 50
    assert (rows[3]["documents"], rows[3]["turned right"], rows[3]["turned wrong"]) == (3, 0, 1)
    assert breakdown(scores([1]), scores([0])) == []


def test_scores_survive_parquet(tmp_path):
    found = Scores("acc_norm", ["a", "b"], ["p", "q"], ["", "g"], [1.0, 0.5], [1.0, 1.0], 7)
    save_scores(found, tmp_path / "scores.parquet")
    assert load_scores(tmp_path / "scores.parquet") == found
    broken = scores([1, math.nan])
    save_scores(broken, tmp_path / "broken.parquet")
    assert math.isnan(load_scores(tmp_path / "broken.parquet").value)


def test_columns_of_different_lengths_are_no_scores():
    with pytest.raises(ValueError, match="no scores"):
        Scores("acc", ["a"], ["p"], [""], [1.0, 1.0], [1.0])
