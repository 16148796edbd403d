"""Divergence and agreement against NumPy and SciPy's bootstrap; gates on them; halves."""

import hashlib
import math

import numpy as np
import pytest
from scipy import stats

from dpq_core.evaluation.scores import PERPLEXITY, Scores
from dpq_core.evaluation.text_divergence import Spot, TextDivergence
from dpq_core.recipe import GatesSection
from dpq_core.verdict.closeness import TOP1, closeness
from dpq_core.verdict.comparison import compare
from dpq_core.verdict.gates import judge
from dpq_core.verdict.halves import ALL, CHOOSING, JUDGING, chooses, windows_of
from dpq_core.verdict.pairing import Failure

NAMES = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(60)]


def measured(windows=60, tokens=200, seed=0, factor=1.0):
    """Windows that are unlike each other, with long tails."""
    rng = np.random.default_rng(seed)
    scale = factor * rng.uniform(0.5, 1.5, (windows, 1))
    nats = (scale * rng.exponential(0.1, (windows, tokens)) ** 2).astype(np.float32)
    spots = tuple(Spot(name, 1, 0.5, True, "", "token 1", "") for name in NAMES[:windows])
    return TextDivergence(NAMES[:windows], nats, nats < np.median(nats) * 20, spots)


def test_every_number_is_numpy_s():
    found = measured()
    shown = closeness(found, 0.95)
    assert list(shown) == [
        "divergence",
        *(f"divergence.{name}" for name in ("median", "p99", "p99_9", "max")),
        TOP1,
    ]
    nats = found.nats.astype(np.float64)
    assert shown["divergence"].candidate == pytest.approx(nats.mean())
    for name, share in (("median", 0.5), ("p99", 0.99), ("p99_9", 0.999), ("max", 1)):
        value = np.quantile(nats, share, method="inverted_cdf")
        assert shown[f"divergence.{name}"].candidate == value
    assert shown[TOP1].candidate == pytest.approx(found.agree.mean())
    assert shown[TOP1].delta == pytest.approx(found.agree.mean() - 1)
    assert all(each.documents == 60 for each in shown.values())
    assert shown["divergence"].delta == shown["divergence"].candidate


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(
    ("name", "of", "near"),
    [
        ("divergence", lambda nats: nats.mean(), 0.05),
        ("divergence.median", lambda nats: np.quantile(nats, 0.5), 0.12),
        ("divergence.p99", lambda nats: np.quantile(nats, 0.99), 0.12),
    ],
)
def test_intervals_are_the_bootstrap_s_over_windows(name, of, near, confidence):
    found = measured()
    nats = found.nats.astype(np.float64)
    rng = np.random.default_rng(7)
    drawn = [of(nats[rng.integers(60, size=60)]) for _ in range(4000)]
    tail = 100 * (1 - confidence) / 2
    expected = np.percentile(drawn, [tail, 100 - tail])
    width = expected[1] - expected[0]
    interval = closeness(found, confidence)[name].interval
    assert interval == pytest.approx(tuple(expected), abs=near * width)


def test_the_agreement_s_interval_is_scipy_s():
    found = measured()
    shares = found.agree.mean(1) - 1
    reference = stats.bootstrap(
        (shares,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = reference.high - reference.low
    interval = closeness(found, 0.95)[TOP1].interval
    assert interval == pytest.approx((reference.low, reference.high), abs=0.05 * width)


def test_a_maximum_and_few_windows_have_no_interval():
    assert closeness(measured(), 0.95)["divergence.max"].interval is None
    assert all(each.interval is None for each in closeness(measured(9), 0.95).values())
    assert closeness(measured(10), 0.95)["divergence"].interval is not None


def test_what_is_not_finite_rejects_and_is_not_averaged_over():
    found = measured()
    found.nats[3, 5] = math.inf
    differences = closeness(found, 0.95)
    wrong = "candidate: the divergence of 1 of 12,000 tokens is not finite"
    assert {name: each.wrong for name, each in differences.items()} == {
        "divergence": wrong,
        TOP1: wrong,
    }
    for gates in (GatesSection(), GatesSection(divergence=1.0)):
        verdict = judge(PERPLEXITIES | differences, {}, gates, None)
        assert verdict.verdict == "rejected"
        assert f"divergence: {wrong}" in verdict.reasons


def perplexity(values):
    return Scores(PERPLEXITY, NAMES[:60], [""] * 60, [""] * 60, values, [100.0] * 60)


SAME = {PERPLEXITY: perplexity([200.0] * 60)}
PERPLEXITIES = compare(SAME, SAME)


def test_what_was_not_measured_is_shown_where_a_gate_asks():
    differences = compare(SAME, SAME, divergence=Failure("failed: out of memory"))
    quiet = judge(differences, {}, GatesSection(), None)
    assert (quiet.verdict, set(quiet.metrics)) == ("promoted", {PERPLEXITY})
    asked = judge(differences, {}, GatesSection(top1_agreement=0.9), None)
    assert asked.verdict == "error"
    assert asked.reasons == ("top1_agreement: failed: out of memory",)


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "promoted"), (3.0, "rejected")])
def test_a_gate_on_divergence_sees_what_perplexity_does_not(factor, verdict):
    differences = compare(SAME, SAME, divergence=measured(factor=factor))
    assert judge(differences, {}, GatesSection(), None).verdict == "promoted"
    gates = GatesSection(divergence=0.04)
    assert judge(differences, {}, gates, None).verdict == verdict


def test_halves_of_the_windows():
    found = measured()
    assert windows_of(found, ALL) is found
    parts = [windows_of(found, which) for which in (CHOOSING, JUDGING)]
    assert sorted(parts[0].windows + parts[1].windows) == sorted(NAMES)
    assert all(chooses(name) for name in parts[0].windows)
    for part in parts:
        assert {spot.window for spot in part.spots} == set(part.windows)
        for name, row in zip(part.windows, part.nats, strict=True):
            np.testing.assert_array_equal(row, found.nats[NAMES.index(name)])
