"""Chosen codes on tokens that no Hessian has seen, beside rounding to nearest."""

import pytest
import torch

from dpq_core.checkpoint.native import load_layer, load_report, save_layer
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.quantize import quantize_or_keep
from dpq_core.layer.shared_input import SharedInput
from dpq_core.layer.unseen import UnseenErrors, UnseenSummary
from dpq_core.recipe.scheme import Scheme

OUT, IN = 48, 64
SCHEME = Scheme(group_size=32, activations="dynamic")
GPTQ = {"method": "gptq", "inner": "none", "activations": "none", "rounding": "nearest"}


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed, count):
    """Correlated, as inputs of linears are."""
    return random(seed, count, 8) @ random(99, 8, IN) + 0.3 * random(seed + 1, count, IN)


def statistics(seen, unseen):
    found = InputStatistics.empty(IN)
    found.add_hessian(seen)
    if unseen is not None:
        found.add_unseen(unseen)
    return found


def quantized(seen, unseen, scheme=SCHEME, **rest):
    return quantize_or_keep(
        random(7, OUT, IN), SharedInput(statistics(seen, unseen)), scheme, 0, **rest
    )


LIKE, UNLIKE = inputs(5, 200), random(6, 200, IN)  # the second: white, where the Hessian's are not


@pytest.mark.parametrize("scheme", [SCHEME, Scheme(group_size=32, **GPTQ)], ids=["dpq", "gptq"])
def test_errors_are_those_of_the_outputs_for_these_tokens(scheme):
    layer = quantized(inputs(1, 2000), LIKE, scheme)
    weight, x = random(7, OUT, IN).double(), LIKE.bfloat16().double()
    nearest = quantized(inputs(1, 2000), None, replace_method(scheme))
    for found, made in (
        (layer.report.unseen.chosen, layer),
        (layer.report.unseen.nearest, nearest),
    ):
        lost = (x @ (made.decoded().double() - weight).T).square().sum()
        assert found == pytest.approx(float(lost / (x @ weight.T).square().sum()), rel=1e-4)
    assert layer.report.unseen.chosen < 0.7 * layer.report.unseen.nearest


def replace_method(scheme):
    fields = {"method": "rtn", "order": "none", "rounding": "nearest"}
    return scheme.model_copy(update=fields)


@pytest.mark.parametrize("what", ["name", "round", "refuse"])
def test_what_becomes_of_codes_that_do_worse_than_rounding(what):
    seen = inputs(1, 2000)
    if what == "refuse":
        with pytest.raises(ValueError, match=r"no Hessian has seen, .*where_rounding_wins: round"):
            quantized(seen, UNLIKE, where_rounding_wins=what)
        return
    layer, plain = quantized(seen, UNLIKE, where_rounding_wins=what), quantized(seen, None)
    nearest = quantized(seen, None, replace_method(SCHEME))
    assert layer.report.unseen.rounding_wins
    assert layer.report.rounded == (what == "round")
    expected = nearest if what == "round" else plain
    assert torch.equal(layer.weight.codes, expected.weight.codes)
    assert layer.report.error == pytest.approx(expected.report.error)
    assert quantized(seen, LIKE, where_rounding_wins=what).report.rounded is False


@pytest.mark.parametrize(
    ("scheme", "unseen"),
    [
        (SCHEME, None),
        (SCHEME, torch.zeros(0, IN)),
        (replace_method(SCHEME), LIKE),
        (SCHEME.model_copy(update={"bits": 8}), LIKE),
    ],
    ids=["no tokens", "none that reached it", "rounded", "eight bits"],
)
def test_nothing_is_said_where_no_codes_are_chosen(scheme, unseen):
    layer = quantized(inputs(1, 2000), unseen, scheme)
    assert layer.report.unseen is None
    assert "unseen" not in layer.report.as_row()


def test_pieces_of_a_layer_have_the_errors_of_the_whole(monkeypatch):
    whole = quantized(inputs(1, 2000), LIKE).report.unseen
    monkeypatch.setattr("dpq_core.layer.quantize.rows_at_once", lambda rows, scheme: 16)
    found = quantized(inputs(1, 2000), LIKE).report.unseen
    assert found.chosen == pytest.approx(whole.chosen, rel=0.05)
    assert found.nearest == pytest.approx(whole.nearest, rel=0.05)


def test_a_report_is_stored(tmp_path):
    layer = quantized(inputs(1, 2000), UNLIKE, where_rounding_wins="round")
    save_layer(tmp_path, layer)
    assert load_report(tmp_path) == layer.report
    assert load_layer(tmp_path).report == layer.report


def test_statistics_keep_and_join_unseen_tokens():
    one, other = statistics(inputs(1, 50), LIKE[:3]), statistics(inputs(2, 50), LIKE[3:7])
    one.add(other)
    assert torch.equal(one.unseen, LIKE[:7].bfloat16())
    assert torch.equal(InputStatistics.from_tensors(one.tensors()).unseen, one.unseen)
    one.add(statistics(inputs(3, 50), None))
    assert len(one.unseen) == 7
    assert one.tokens == 150


def test_what_a_reader_is_told():
    def row(name, chosen, nearest, **rest):
        return {"name": name, "unseen": {"chosen": chosen, "nearest": nearest}, **rest}

    rows = [row("a", 0.1, 0.2), row("b", 0.3, 0.2), row("c", 0.4, 0.2, rounded=True), {"name": "d"}]
    found = UnseenSummary.of(rows)
    assert "1.50 times" in found.line
    assert "3 layers, at worst 2.00" in found.line
    assert (found.lost, found.rounded) == (["b", "c"], ["c"])
    lost, rounded = found.warnings
    assert "has seen: b; give" in lost
    assert rounded.endswith("unseen tokens: c")
    assert UnseenSummary.of(rows[3:]) is None
    assert UnseenSummary.of(rows[:1]).warnings == []
    assert not UnseenErrors(0.1, 0.1).rounding_wins
