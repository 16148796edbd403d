"""Answers that changed, by hand; what an accuracy hides."""

import math

import pytest
from pyarrow import parquet
from scipy import stats

from dpq_core.evaluation.scores import Scores, load_scores, save_scores
from dpq_core.recipe import GatesSection
from dpq_core.verdict.comparison import compare
from dpq_core.verdict.flips import flips
from dpq_core.verdict.gates import judge
from dpq_core.verdict.halves import CHOOSING, chooses, those

GOLD = 0


def scores(picks, margins=None, name="", kept=True):
    count = len(picks)
    return Scores(
        metric="acc",
        documents=[f"{name}{place}" for place in range(count)],
        parts=[name] * count,
        groups=[""] * count,
        values=[float(pick == GOLD) for pick in picks],
        weights=[1.0] * count,
        picks=list(picks) if kept else [],
        margins=(margins or [1.0] * count) if kept else [],
    )


BEFORE = [0, 0, 1, 1, 2, 0, 3, 3, 0, 0]
AFTER = [1, 0, 0, 2, 2, 0, 1, 3, 0, 0]  # wrong, –, right, other, –, –, other, –, –, –


def test_three_kinds_of_flips_by_hand():
    margins = [0.1, 5.0, 0.2, 0.3, 6.0, 7.0, 0.4, 8.0, 9.0, 4.0]
    before, after = scores(BEFORE, margins), scores(AFTER, [2.0] * 10)
    found = compare({"s": before}, {"s": after})
    suite = found["accuracy.s"]
    assert (suite.turned_right, suite.turned_wrong, suite.turned_other) == (1, 1, 2)
    assert suite.delta == 0  # they cancel
    assert (found["flips"].baseline, found["flips"].candidate) == (0, 40)
    assert suite.margin == pytest.approx((4.0 + 5.0) / 2)
    assert suite.margin_candidate == 2
    assert suite.margin_turned == pytest.approx((0.2 + 0.3) / 2)


def test_where_choices_are_not_kept_the_third_kind_is_not_seen():
    for kept in ((True, False), (False, True), (False, False)):
        sides = [scores(p, kept=k) for p, k in zip((BEFORE, AFTER), kept, strict=True)]
        found = compare({"s": sides[0]}, {"s": sides[1]})
        assert found["flips"].candidate == 20
        assert found["accuracy.s"].turned_other is None
        assert found["accuracy.s"].margin is None


def test_a_model_flips_nothing_of_its_own():
    same = {"s": scores(BEFORE)}
    found = compare(same, same)
    assert found["flips"].candidate == 0
    assert found["flips"].interval[0] >= 0
    assert found["flips"].interval[1] > 5  # ten documents are not certainty
    assert (found["accuracy.s"].turned_other, found["accuracy.s"].margin_turned) == (0, None)


def test_the_mean_is_over_suites_and_its_interval_scipy_s():
    small = scores([0] * 100, name="a"), scores([0] * 80 + [1] * 20, name="a")
    large = scores([1] * 1000, name="b"), scores([1] * 900 + [2] * 100, name="b")
    found = flips([small, large], 0.9)
    assert found.candidate == pytest.approx((20 + 10) / 2)
    assert found.documents == 1100
    reference = stats.bootstrap(
        ([0.0] * 80 + [1.0] * 20, [0.0] * 900 + [1.0] * 100),
        lambda a, b, axis: 100 * (a.mean(axis) + b.mean(axis)) / 2,
        confidence_level=0.9,
        method="percentile",
    ).confidence_interval
    assert found.interval == pytest.approx((reference.low, reference.high), abs=0.35)


def test_mmlu_has_flips_of_its_own_and_is_not_in_the_mean():
    sides = (
        {"mmlu": scores(BEFORE), "s": scores([0, 1])},
        {"mmlu": scores(AFTER), "s": scores([0, 1])},
    )
    found = compare(*sides)
    assert (found["flips"].candidate, found["flips.mmlu"].candidate) == (0, 40)
    verdict = judge(found, {}, GatesSection(accuracy_drop=90, flips=40), None)
    assert verdict.verdict == "rejected"
    assert [reason.partition(":")[0] for reason in verdict.reasons] == ["flips.mmlu"]


def test_a_gate_on_mmlu_alone_is_measured():
    found = compare({"mmlu": scores(BEFORE)}, {"mmlu": scores(BEFORE)})
    assert judge(found, {}, GatesSection(flips=40), None).verdict == "promoted"


def test_a_gate_on_flips_sees_what_the_mean_does_not():
    """As many turned right as turned wrong: half of all answers are others."""
    before, after = scores([0, 1] * 1000), scores([1, 0] * 500 + [0, 1] * 500)
    found = compare({"s": before}, {"s": after})
    assert found["accuracy.s"].delta == 0
    assert judge(found, {}, GatesSection(accuracy_drop=5), None).verdict == "promoted"
    rejected = judge(found, {}, GatesSection(accuracy_drop=5, flips=10), None)
    assert rejected.verdict == "rejected"
    assert rejected.metrics["flips"].standing == "failed"


def test_a_broken_suite_is_told_once():
    broken = scores([0, 1])
    broken.values[0] = math.nan
    found = compare({"s": scores([0, 1])}, {"s": broken})
    told = judge(found, {}, GatesSection(), None)
    assert not any(reason.startswith("flips") for reason in told.reasons)
    assert "flips" not in told.metrics
    asked = judge(found, {}, GatesSection(flips=5), None)
    assert asked.verdict == "rejected"
    assert any(reason.startswith("flips: ") for reason in asked.reasons)


def test_choices_survive_parquet_and_files_without_them_are_read(tmp_path):
    path = tmp_path / "scores.parquet"
    save_scores(scores(BEFORE), path)
    assert load_scores(path) == scores(BEFORE)
    older = scores(BEFORE, kept=False)
    save_scores(older, path)
    assert "picks" not in parquet.read_table(path).column_names
    assert load_scores(path) == older


def test_halves_keep_each_document_s_choice():
    found = scores(BEFORE)
    half = those({"s": found}, CHOOSING)["s"]
    kept = [pick for name, pick in zip(found.documents, BEFORE, strict=True) if chooses(name)]
    assert half.picks == kept
    assert len(half.margins) == len(half)
    assert those({"s": scores(BEFORE, kept=False)}, CHOOSING)["s"].picks == []


def test_columns_of_other_lengths_are_no_choices():
    with pytest.raises(ValueError, match="no scores"):
        Scores("acc", ["a"], ["p"], [""], [1.0], [1.0], picks=[1, 2])
