"""Three words, by the boundaries; how many documents would show it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_core.evaluation.scores import PERPLEXITY
from dpq_core.recipe import GatesSection
from dpq_core.verdict.closeness import NATS, SHARE, TOP1
from dpq_core.verdict.gates import judge
from dpq_core.verdict.pairing import Difference
from dpq_core.verdict.standing import judged_metric

AVERAGE = "accuracy_average"
LIMITS = {  # representable, all of them
    "perplexity_increase": 0.25,
    "accuracy_drop": 0.5,
    "divergence": 0.125,
    "top1_agreement": 0.75,
    "flips": 2.0,
}
# name, metric, baseline, the sign of a loss, what a loss must stay below, whether it may be that
GATES = {
    PERPLEXITY: (PERPLEXITY, 8.0, 1, 0.25, False),
    AVERAGE: ("acc", 64.0, -1, 0.5, False),
    "accuracy.mmlu": ("acc", 64.0, -1, 0.5, False),
    "divergence": (NATS, 0.0, 1, 0.125, False),
    TOP1: (SHARE, 1.0, -1, 0.25, True),
    "flips": ("percent of answers", 0.0, 1, 2.0, False),
    "flips.mmlu": ("percent of answers", 0.0, 1, 2.0, False),
}
HAIR = 1e-8


def found(name, loss, worst, documents=100):
    """A difference that loses so much, whose interval's worse end is there."""
    metric, baseline, sign, *_ = GATES[name]
    interval = None
    if worst is not None:
        ends = sorted((sign * worst, sign * (2 * loss - worst)))
        interval = (ends[0], ends[1])
    delta = sign * loss
    return Difference(metric, baseline, baseline + delta, delta, interval, documents)


def judged(name, loss, worst, confidence=None, documents=100, **limits):
    gates = GatesSection(**LIMITS | limits, confidence=confidence)
    return judged_metric(name, found(name, loss, worst, documents), gates)


@pytest.mark.parametrize("name", GATES)
def test_the_words_at_the_limit(name):
    """The limit itself fails, or shows what a floor may reach."""
    *_, limit, floor = GATES[name]
    at, above, below = limit, limit + HAIR, limit - HAIR
    assert judged(name, above, above + 1).standing == "failed"
    assert judged(name, at, above).standing == ("not shown" if floor else "failed")
    assert judged(name, below, at).standing == ("shown" if floor else "not shown")
    assert judged(name, below, above).standing == "not shown"
    assert judged(name, below - HAIR, below).standing == "shown"
    assert judged(name, below, None).standing == "not shown"
    assert judged(name, -limit, below).standing == "shown"


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize(
    ("places", "passes", "passes_with_confidence"),
    [((0.5, 0.9), True, True), ((0.5, 1.5), True, False), ((1.5, 2.0), False, False)],
)
def test_what_is_not_shown_passes_unless_confidence_is_asked_for(
    name, places, passes, passes_with_confidence
):
    *_, limit, _ = GATES[name]
    loss, worst = (limit * place for place in places)
    assert judged(name, loss, worst).passed is passes
    certain = judged(name, loss, worst, confidence=0.95)
    assert certain.passed is passes_with_confidence
    assert certain.standing == judged(name, loss, worst).standing
    assert not certain.unmeasured


def test_a_loss_beyond_the_limit_fails_whatever_its_interval_says():
    """A bootstrap's percentiles can leave the measured difference out."""
    metric = judged(PERPLEXITY, 0.3, 0.2, confidence=0.95)
    assert (metric.standing, metric.passed) == ("failed", False)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("confidence", [None, 0.95])
def test_nan_and_missing_fail(name, confidence):
    gates = GatesSection(**LIMITS, confidence=confidence)
    metric, baseline, *_ = GATES[name]
    nan = Difference(metric, baseline, math.nan, math.nan, (math.nan, math.nan), 100)
    missing = Difference(metric, wrong="not finite")
    for each in (nan, missing):
        verdict = judge({name: each}, {}, gates.model_copy(update=unasked(name)), None)
        assert verdict.metrics[name].standing == "failed"
        assert verdict.metrics[name].needed is None
        assert verdict.verdict == "rejected"
    half = replace(found(name, 0.0, 0.1), interval=(math.nan, math.nan))
    assert judged_metric(name, half, gates).standing == "not shown"


def unasked(name):
    """The gates that would ask for more than this metric."""
    optional = {"divergence", "top1_agreement", "flips"}
    return dict.fromkeys(optional - {name.partition(".")[0]})


def test_what_no_gate_looks_at_has_no_standing():
    metric = judged_metric("accuracy.piqa", found(AVERAGE, 3.0, 4.0), GatesSection())
    assert (metric.standing, metric.limit, metric.passed) == (None, None, True)
    for name in ("divergence", "flips", TOP1):
        metric = judged_metric(name, found(name, 3.0, 4.0), GatesSection())
        assert (metric.standing, metric.passed) == (None, True)


def test_limits_of_divergence_agreement_and_flips_are_never_relative():
    for name in ("divergence", TOP1, "flips"):
        *_, limit, _ = GATES[name]
        metric = judged(name, 0.9 * limit, 0.95 * limit, mode="relative")
        assert metric.standing == "shown"


@pytest.mark.parametrize(
    ("loss", "worst", "needed"),
    [
        (0.0, 1.0, 400),  # twice as far as may be: four times as many
        (0.25, 0.75, 400),
        (0.25, 0.51, 109),
        (0.25, 0.5, 101),  # at the limit itself: more than there are
        (-0.5, 1.5, 400),
        (0.0, 0.4, None),  # shown
        (0.6, 0.7, None),  # failed: no number of documents would
    ],
)
def test_how_many_documents_would_show_it(loss, worst, needed):
    assert judged(AVERAGE, loss, worst).needed == needed


def test_the_number_of_documents_is_said_with_what_they_are():
    assert judged(AVERAGE, 0.25, 0.51).way_out == "about 110 documents would show it"
    assert judged(AVERAGE, 0.25, 0.26).way_out == ""
    assert judged(PERPLEXITY, 0.0, 2.0, documents=141).way_out == (
        "about 9,000 windows would show it"
    )
    assert judged(PERPLEXITY, 0.0, None).way_out == "fewer than 10 windows have no interval"


def test_so_many_documents_show_it_every_second_time():
    """Turned answers drawn anew, as many as are said to be needed."""
    rng, turned, drop, documents = np.random.default_rng(0), 0.06, 0.002, 2000

    def worst_of(count):
        right, wrong, _ = rng.multinomial(
            count, [(turned - drop) / 2, (turned + drop) / 2, 1 - turned]
        )
        mean = (wrong - right) / count
        return 100 * (mean + 1.96 * math.sqrt(((right + wrong) / count - mean**2) / count))

    reach = 1.96 * math.sqrt((turned - drop**2) / documents)
    needed = judged(AVERAGE, 100 * drop, 100 * (drop + reach), documents=documents).needed
    assert needed > 10 * documents
    shown = np.mean([worst_of(needed) < 0.5 for _ in range(2000)])
    assert shown == pytest.approx(0.5, abs=0.04)


ends = st.floats(-5, 5)


@given(st.sampled_from(sorted(GATES)), ends, ends, ends)
def test_a_better_end_is_never_a_worse_word(name, loss, first, second):
    order = ("failed", "not shown", "shown")
    better, worse = sorted((max(loss, first), max(loss, second)))
    words = [judged(name, loss, end).standing for end in (worse, better)]
    assert order.index(words[0]) <= order.index(words[1])


def test_reasons_say_what_was_lost_and_what_would_show_it():
    gates = GatesSection(**LIMITS, confidence=0.9)
    differences = {
        "divergence": found("divergence", 0.2, 0.3),
        TOP1: found(TOP1, 0.1, 0.3, documents=12),
        "flips": found("flips", 1.0, 3.0),
    }
    verdict = judge(differences, {}, gates, None)
    assert verdict.verdict == "rejected"
    assert verdict.reasons == (
        "divergence: 0.2 nats a token, which is not below the limit of 0.125",
        "top1_agreement: 0.9000 of the most likely tokens are the same, 90% interval of the"
        " difference -0.3000 to +0.1000: not shown to be within the limit of 0.75; about 22 windows"
        " would show it",
        "flips: 1 % of the answers changed, 90% interval of the difference -1.0000 to +3.0000: not"
        " shown to be within the limit of 2; about 400 documents would show it",
    )
    json.dumps(verdict.as_dict(), allow_nan=False)


@pytest.mark.parametrize("gate", ["divergence", "top1_agreement", "flips"])
def test_a_gate_on_what_was_not_measured_is_no_verdict(gate):
    differences = {PERPLEXITY: found(PERPLEXITY, 0.0, 0.1)}
    verdict = judge(differences, {}, GatesSection(**{gate: 0.5}), None)
    assert verdict.verdict == "error"
    assert verdict.reasons == (f"{gate}: not measured",)
    assert judge(differences, {}, GatesSection(), None).verdict == "promoted"
