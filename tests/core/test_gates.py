import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_core.gates import ACCURACY, PERPLEXITY, judge
from dpq_core.recipe import GatesSection

BASELINE = {PERPLEXITY: 8.0, ACCURACY: 64.0}
BAD = [None, math.nan, math.inf, -math.inf]
DEFAULT = GatesSection()
EXACT = GatesSection(perplexity_increase=0.25, accuracy_drop=0.5)  # representable limits


def verdict(candidate, baseline=BASELINE, integrity=None, gates=DEFAULT, limited=False):
    return judge(baseline, candidate, integrity or {}, gates, limited)


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


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("name", [PERPLEXITY, ACCURACY])
@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_missing_or_not_finite_fails(side, name, mode, bad):
    sides = {"baseline": BASELINE, "candidate": BASELINE}
    result = verdict(**sides | {side: BASELINE | {name: bad}}, gates=GatesSection(mode=mode))
    assert result.reasons == (f"{name}: {side} missing or not finite",)
    json.dumps(result.as_dict(), allow_nan=False)


@pytest.mark.parametrize("name", [PERPLEXITY, ACCURACY])
@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_absent_on_one_side_fails(side, name):
    sides = {"baseline": BASELINE, "candidate": BASELINE}
    without = {key: value for key, value in BASELINE.items() if key != name}
    assert not promoted(**sides | {side: without})


def test_what_was_measured_on_neither_side_is_not_judged():
    assert promoted({PERPLEXITY: 8.0}, {PERPLEXITY: 8.0})


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


@given(baseline=values, candidate=values, gates=any_gates, limited=st.booleans())
@settings(deadline=None, max_examples=100)
def test_integrity_failure_always_rejects(baseline, candidate, gates, limited):
    failed = {"files": None, "tensors": "lm_head.weight has NaN"}
    result = verdict(candidate, baseline, failed, gates, limited)
    assert result.verdict == "rejected"
    assert "integrity: tensors: lm_head.weight has NaN" in result.reasons
    assert not any("files" in reason for reason in result.reasons)


@pytest.mark.parametrize(
    ("limited", "allow", "expected"),
    [(False, False, True), (True, False, False), (True, True, True), (False, True, True)],
)
def test_limited_runs_are_for_looking(limited, allow, expected):
    gates = GatesSection(allow_limited=allow)
    assert promoted(BASELINE, gates=gates, limited=limited) is expected


@pytest.mark.parametrize("measured", [{}, {"perplexity_word": 9.0, "piqa": 70.0}])
def test_nothing_that_a_gate_judges_is_rejected(measured):
    result = verdict(measured, measured)
    assert result.reasons == ("nothing was measured that a gate could judge",)
    assert all(metric.passed and metric.limit is None for metric in result.metrics.values())


def test_other_metrics_are_shown_and_not_judged():
    extra = {"perplexity_word": 9.0, "piqa": None}
    result = verdict(BASELINE | {"perplexity_word": 90.0, "piqa": 1.0}, BASELINE | extra)
    assert result.verdict == "promoted"
    assert result.metrics["perplexity_word"].delta == 81
    assert result.metrics["piqa"].delta is None


def test_every_reason_is_given_with_its_numbers():
    result = verdict({PERPLEXITY: 9.0, ACCURACY: 60.0}, integrity={"files": "gone"}, limited=True)
    assert len(result.reasons) == 4
    perplexity = next(reason for reason in result.reasons if reason.startswith(PERPLEXITY))
    assert "from 8.0000 to 9.0000 (+1.0000)" in perplexity
    assert "0.05" in perplexity
    accuracy = next(reason for reason in result.reasons if reason.startswith(ACCURACY))
    assert "from 64.0000 to 60.0000 (-4.0000)" in accuracy
    assert "0.5 points" in accuracy
