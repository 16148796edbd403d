import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_core.evaluation.scores import PERPLEXITY, Scores
from dpq_core.recipe import GatesSection
from dpq_core.verdict.comparison import COMMONSENSE, compare
from dpq_core.verdict.gates import NotMeasuredError, judge
from dpq_core.verdict.pairing import Difference, Failure

ACCURACY = "commonsense_accuracy"
BASELINE = {PERPLEXITY: 8.0, ACCURACY: 64.0}
DEFAULT = GatesSection()
EXACT = GatesSection(perplexity_increase=0.25, accuracy_drop=0.5)  # representable limits


def differences(baseline, candidate, spread=0.0):
    """As if measured; intervals reach `spread` to both sides."""
    return {
        name: Difference(
            metric=PERPLEXITY if name == PERPLEXITY else "acc",
            baseline=before,
            candidate=candidate[name],
            delta=candidate[name] - before,
            interval=(candidate[name] - before - spread, candidate[name] - before + spread),
        )
        for name, before in baseline.items()
    }


def verdict(candidate, baseline=BASELINE, integrity=None, gates=DEFAULT, limited=None, spread=0.0):
    found = differences(baseline, baseline | candidate, spread)
    return judge(found, integrity or {}, gates, limited)


def scores(values, metric="acc", name="", weights=None):
    count = len(values)
    return Scores(
        metric=metric,
        documents=[f"{name}{place}" for place in range(count)],
        parts=[name] * count,
        groups=[""] * count,
        values=[float(value) for value in values],
        weights=weights or [1.0] * count,
    )


def promoted(*arguments, **keywords):
    result = verdict(*arguments, **keywords)
    assert (result.verdict == "promoted") == (result.reasons == ())
    return result.verdict == "promoted"


def test_equal_is_promoted_with_the_numbers():
    result = verdict(BASELINE)
    assert result.verdict == "promoted"
    assert result.reasons == ()
    metric = result.metrics[PERPLEXITY]
    assert (metric.baseline, metric.candidate, metric.delta, metric.limit) == (8.0, 8.0, 0.0, 0.05)
    assert metric.passed
    assert json.loads(json.dumps(result.as_dict()))["metrics"][ACCURACY]["limit"] == 0.5


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ({PERPLEXITY: 8.25}, False),  # the limit itself
        ({PERPLEXITY: 8.25 - 1e-8}, True),
        ({PERPLEXITY: 7.0}, True),
        ({ACCURACY: 63.5}, False),  # the limit itself
        ({ACCURACY: 63.5 + 1e-8}, True),
        ({ACCURACY: 70.0}, True),
    ],
)
def test_boundary_fails(candidate, expected):
    assert promoted(BASELINE | candidate, gates=EXACT) is expected


@pytest.mark.parametrize(("before", "after"), [(573, 568), (641, 636), (505, 500), (999, 994)])
def test_boundary_fails_whatever_the_baseline(before, after):
    """Five documents in a thousand are half a point, also where floats say 0.4999999999999929."""
    baseline, candidate = {ACCURACY: 100 * before / 1000}, {ACCURACY: 100 * after / 1000}
    assert not promoted(candidate, baseline)


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ({PERPLEXITY: 8.0 * 1.02}, False),
        ({PERPLEXITY: 8.0 * 1.0199}, True),
        ({ACCURACY: 64.0 * 0.99}, False),
        ({ACCURACY: 64.0 * 0.9901}, True),
    ],
)
def test_relative_limits_are_percent_of_the_baseline(candidate, expected):
    gates = GatesSection(perplexity_increase=2, accuracy_drop=1, mode="relative")
    assert promoted(BASELINE | candidate, gates=gates) is expected


def test_relative_to_zero_fails():
    gates = GatesSection(mode="relative")
    zero = BASELINE | {ACCURACY: 0.0}
    assert not promoted(zero, zero, gates=gates)


EVALUATION = {
    PERPLEXITY: scores([20.0] * 12, PERPLEXITY, weights=[10.0] * 12),
    **{suite: scores([1, 0, 1, 1], name=suite) for suite in COMMONSENSE},
    "mmlu": scores([1, 0], name="mmlu"),
    "wikitext": scores([30.0, 40.0], "perplexity_word", weights=[10.0, 20.0]),
}
PLANTED = {
    "a failed suite": Failure("failed: ValueError: broken"),
    "a NaN": scores([1, 0, 1, math.nan], name="boolq"),
    "a missing document": scores([1, 0, 1], name="boolq"),
    "another document": scores([1, 0, 1, 1], name="others"),
    "another metric": scores([1, 0, 1, 1], "acc_norm", name="boolq"),
}


def of_evaluations(baseline, candidate, **keywords):
    found = compare(baseline, candidate)
    return judge(found, {}, keywords.get("gates", DEFAULT), keywords.get("limited"))


def test_the_names_of_what_is_compared():
    result = of_evaluations(EVALUATION, EVALUATION)
    assert result.verdict == "promoted"
    judged = {name for name, metric in result.metrics.items() if metric.limit is not None}
    assert judged == {PERPLEXITY, ACCURACY, "accuracy.mmlu"}
    shown = {f"accuracy.{suite}" for suite in COMMONSENSE} | {"perplexity_word"}
    shown |= {"flips", "flips.mmlu"}
    assert set(result.metrics) == judged | shown
    assert result.metrics[ACCURACY].baseline == 75
    assert result.metrics[PERPLEXITY].baseline == pytest.approx(math.exp(2))
    assert result.metrics["perplexity_word"].baseline == pytest.approx(math.exp(70 / 30))
    fewer = {name: found for name, found in EVALUATION.items() if name != "boolq"}
    assert "accuracy_average" in compare(fewer, fewer)


@pytest.mark.parametrize("limited", [None, "evaluation.limit"])
@pytest.mark.parametrize("side", ["baseline", "candidate"])
@pytest.mark.parametrize("planted", PLANTED)
def test_a_broken_suite_is_never_averaged_over(side, planted, limited):
    """A NaN of the candidate's is what was measured of it, and rejects it. All else says nothing of
    the candidate: neither promoted nor rejected."""
    sides = {"baseline": EVALUATION, "candidate": EVALUATION}
    broken = EVALUATION | {"boolq": PLANTED[planted]}
    result = of_evaluations(**sides | {side: broken}, limited=limited)
    measured = (side, planted) == ("candidate", "a NaN")
    assert result.verdict == ("rejected" if measured else "error")
    assert result.metrics[ACCURACY].delta is None
    assert any(reason.startswith("accuracy.boolq: ") for reason in result.reasons)
    assert any(reason.startswith(f"{ACCURACY}: boolq: ") for reason in result.reasons) is measured
    json.dumps(result.as_dict(), allow_nan=False)
    if measured:
        assert result.or_error("it") is result
    else:
        with pytest.raises(NotMeasuredError, match=r"it was not measured.*accuracy\.boolq: "):
            result.or_error("it")


@pytest.mark.parametrize("name", [PERPLEXITY, "mmlu", "wikitext", "piqa"])
@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_what_was_measured_on_one_side_only_is_not_judged(side, name):
    sides = {"baseline": EVALUATION, "candidate": EVALUATION}
    without = {key: value for key, value in EVALUATION.items() if key != name}
    result = of_evaluations(**sides | {side: without})
    assert result.verdict == "error"
    assert any(f"{side} not measured" in reason for reason in result.reasons)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_perplexity_that_is_not_finite_fails(value):
    broken = {PERPLEXITY: scores([20.0] * 11 + [value], PERPLEXITY, weights=[10.0] * 12)}
    result = of_evaluations(EVALUATION, EVALUATION | broken)
    assert result.verdict == "rejected"
    assert result.reasons == (
        f"{PERPLEXITY}: candidate: the scores of 1 of 12 documents are not finite",
    )
    assert of_evaluations(EVALUATION | broken, EVALUATION).verdict == "error"


def test_a_perplexity_whose_sum_overflows_fails():
    vast = {PERPLEXITY: scores([2e4] * 12, PERPLEXITY, weights=[10.0] * 12)}
    result = of_evaluations(EVALUATION, EVALUATION | vast)
    assert (result.verdict, result.reasons) == ("rejected", (f"{PERPLEXITY}: candidate infinite",))
    assert of_evaluations(EVALUATION | vast, EVALUATION).verdict == "error"


def test_what_was_measured_on_neither_side_is_not_judged():
    assert of_evaluations(*[{PERPLEXITY: EVALUATION[PERPLEXITY]}] * 2).verdict == "promoted"


@pytest.mark.parametrize(
    ("spread", "confidence", "expected"),
    [(0.2, None, True), (0.2, 0.95, True), (0.3, None, True), (0.3, 0.95, False)],
)
def test_confidence_judges_the_worse_end(spread, confidence, expected):
    gates = GatesSection(perplexity_increase=0.5, accuracy_drop=0.5, confidence=confidence)
    candidate = {PERPLEXITY: 8.25, ACCURACY: 63.75}
    result = verdict(candidate, gates=gates, spread=spread)
    assert (result.verdict == "promoted") is expected
    assert all(metric.passed is expected for metric in result.metrics.values())
    assert all("95% interval" in reason for reason in result.reasons)
    assert all("not shown to be within" in reason for reason in result.reasons)


def test_confidence_without_an_interval_says_nothing():
    few = {PERPLEXITY: scores([20.0] * 9, PERPLEXITY, weights=[10.0] * 9)}
    assert of_evaluations(few, few).verdict == "promoted"
    result = of_evaluations(few, few, gates=GatesSection(confidence=0.9))
    assert result.verdict == "error"
    assert "too few windows" in result.reasons[0]
    assert result.metrics[PERPLEXITY].standing == "not shown"


finite = st.floats(1e-3, 1e4)
values = st.fixed_dictionaries({PERPLEXITY: finite, ACCURACY: st.floats(0, 100)})
any_gates = st.builds(
    GatesSection,
    perplexity_increase=st.floats(1e-3, 10),
    accuracy_drop=st.floats(1e-3, 10),
    mode=st.sampled_from(["absolute", "relative"]),
)
near = st.floats(-20, 20)


@given(baseline=values, gates=any_gates, first=near, second=near, data=st.data())
@settings(deadline=None, max_examples=300)
def test_monotone_in_every_metric(baseline, gates, first, second, data):
    """What is promoted stays promoted when one number of the candidate gets better."""
    name = data.draw(st.sampled_from([PERPLEXITY, ACCURACY]))
    worse, better = sorted([baseline[name] + first, baseline[name] + second])
    if name == PERPLEXITY:
        worse, better = better, worse
    if promoted(baseline | {name: worse}, baseline, gates=gates):
        assert promoted(baseline | {name: better}, baseline, gates=gates)


@given(baseline=values, candidate=values, limits=st.tuples(finite, finite), data=st.data())
@settings(deadline=None, max_examples=200)
def test_monotone_in_the_limits(baseline, candidate, limits, data):
    field = data.draw(st.sampled_from(["perplexity_increase", "accuracy_drop"]))
    tight, loose = (GatesSection(**{field: limit}) for limit in sorted(limits))
    if promoted(candidate, baseline, gates=tight):
        assert promoted(candidate, baseline, gates=loose)


limits = st.sampled_from([None, "evaluation.limit"])


@given(baseline=values, candidate=values, gates=any_gates, limited=limits)
@settings(deadline=None, max_examples=100)
def test_integrity_failure_always_rejects(baseline, candidate, gates, limited):
    failed = {"files": None, "tensors": "lm_head.weight has NaN"}
    result = verdict(candidate, baseline, failed, gates, limited)
    assert result.verdict == "rejected"
    assert "integrity: tensors: lm_head.weight has NaN" in result.reasons
    assert not any("files" in reason for reason in result.reasons)


@pytest.mark.parametrize("candidate", [BASELINE, {PERPLEXITY: 9.0}])
@pytest.mark.parametrize(
    ("limited", "allow"),
    [("evaluation.limit", False), ("images.test_samples", True), (None, True)],
)
def test_limited_runs_are_for_looking(candidate, limited, allow):
    result = verdict(candidate, gates=GatesSection(allow_limited=allow), limited=limited)
    judged = "promoted" if candidate is BASELINE else "rejected"
    inspected = bool(limited) and not allow
    assert result.verdict == ("inspected" if inspected else judged)
    assert any(f"{limited} left documents" in r for r in result.reasons) is inspected


@pytest.mark.parametrize("measured", [{}, {"wikitext": EVALUATION["wikitext"]}])
def test_nothing_that_a_gate_judges_is_no_verdict(measured):
    result = of_evaluations(measured, measured)
    assert result.verdict == "error"
    assert result.reasons == ("nothing was measured that a gate could judge",)
    assert all(metric.passed and metric.limit is None for metric in result.metrics.values())


def test_other_metrics_are_shown_and_not_judged():
    worse = {"wikitext": scores([60.0, 80.0], "perplexity_word", weights=[10.0, 20.0])}
    result = of_evaluations(EVALUATION, EVALUATION | worse)
    assert result.verdict == "promoted"
    assert result.metrics["perplexity_word"].delta > 50


def test_every_reason_is_given_with_its_numbers():
    result = verdict({PERPLEXITY: 9.0, ACCURACY: 60.0}, integrity={"files": "gone"}, limited="x")
    assert len(result.reasons) == 4
    perplexity = next(reason for reason in result.reasons if reason.startswith(PERPLEXITY))
    assert "from 8.0000 to 9.0000 (+1.0000)" in perplexity
    assert "0.05" in perplexity
    accuracy = next(reason for reason in result.reasons if reason.startswith(ACCURACY))
    assert "from 64.0000 to 60.0000 (-4.0000)" in accuracy
    assert "0.5 points" in accuracy


FAST = GatesSection(throughput_ratio=1.8)


@pytest.mark.parametrize(
    ("ratios", "reason"),
    [
        ({"cpu": 1.8}, None),  # the limit itself
        ({"cpu": 2.5, "cuda": 3.0}, None),
        ({"cpu": 1.7999}, "throughput_ratio.cpu: 1.8 does not reach"),
        ({"cpu": 2.5, "cuda": 1.0}, "throughput_ratio.cuda: 1 does not reach"),
        ({"cuda": Failure("not measured here: x")}, "throughput_ratio.cuda: not measured here: x"),
        ({"cpu": math.nan}, "throughput_ratio.cpu: it is nan"),
        ({}, "throughput_ratio: not measured"),
    ],
)
def test_speed_must_reach_its_limit_on_every_device(ratios, reason):
    result = judge(differences(BASELINE, BASELINE), {}, FAST, None, ratios)
    missing = not ratios or any(isinstance(found, Failure) for found in ratios.values())
    assert result.verdict == ("error" if missing else "rejected" if reason else "promoted")
    assert len(result.reasons) == bool(reason)
    assert "".join(result.reasons).startswith(reason or "")
    json.dumps(result.as_dict(), allow_nan=False)


def test_speed_that_no_gate_asks_for_is_shown_where_there_is_any():
    ratios = {"cpu": 0.5, "cuda": Failure("not measured here")}
    result = judge(differences(BASELINE, BASELINE), {}, DEFAULT, None, ratios)
    assert result.verdict == "promoted"
    assert result.metrics["throughput_ratio.cpu"].candidate == 0.5
    assert "throughput_ratio.cuda" not in result.metrics


def test_speed_is_not_judged_before_it_is_measured():
    assert judge(differences(BASELINE, BASELINE), {}, FAST, None).verdict == "promoted"
