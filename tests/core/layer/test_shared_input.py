"""Layers that read one input share its Hessian and factor, and each has the bytes it has alone."""

from collections import Counter

import pytest
import torch

from dpq_core.checkpoint.native import layer_tensors
from dpq_core.layer import shared_input
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.quantize import quantize_layer, quantize_or_keep
from dpq_core.layer.shared_input import SharedInput
from dpq_core.recipe.scheme import Scheme

FEATURES = 96
OWN = Scheme(group_size=32)
SCHEMES = {
    "own": OWN,
    "other order": Scheme(group_size=32, order="activation"),
    "other groups": Scheme(group_size=16),
    "8 bits": Scheme(bits=8),
    "16 bits": Scheme(method="none"),
    "no order": Scheme(group_size=32, order="none"),
    "more damping": Scheme(group_size=32, damp_frac=0.05),
    "static": Scheme(group_size=32, activations="static"),
}


@pytest.fixture
def factors(monkeypatch):
    """Dampings of all factorisations."""
    asked, make = [], shared_input.inverse_factor

    def counted(hessian, damp_frac):
        asked.append(damp_frac)
        return make(hessian, damp_frac)

    monkeypatch.setattr(shared_input, "inverse_factor", counted)
    return asked


def statistics():
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(FEATURES, FEATURES, generator=generator) / 8
    x = torch.randn(500, FEATURES, generator=generator) @ mixing * torch.linspace(0.2, 3, FEATURES)
    found = InputStatistics.empty(FEATURES)
    found.add_hessian(x.bfloat16())
    found.add_magnitudes(x.bfloat16())
    return found


def weight(seed):
    return torch.randn(40, FEATURES, generator=torch.Generator().manual_seed(seed)) / 10


def assert_same(one, other):
    assert one.report.error == other.report.error
    left, right = layer_tensors(one), layer_tensors(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_one_factor_for_all_of_a_scheme(factors):
    shared = SharedInput(statistics())
    made = [quantize_or_keep(weight(seed), shared, OWN, 1.0) for seed in range(3)]
    assert factors == [OWN.damp_frac]
    for seed, layer in enumerate(made):
        alone = quantize_or_keep(weight(seed), SharedInput(statistics()), OWN, 1.0)
        assert_same(layer, alone)


@pytest.mark.parametrize("names", [list(SCHEMES), list(reversed(SCHEMES))], ids=["there", "back"])
def test_schemes_in_any_order(factors, names):
    shared = SharedInput(statistics())
    for seed, name in enumerate(names):
        layer = quantize_or_keep(weight(seed), shared, SCHEMES[name], 1.0)
        assert layer.report.tokens == 500
        assert_same(layer, quantize_layer(weight(seed), statistics(), SCHEMES[name]))
    assert Counter(factors)[0.05] == 2  # shared, and alone


def test_a_hessian_comes_back_from_every_order():
    shared, expected = SharedInput(statistics()), statistics().hessian()
    order = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(2))
    assert torch.equal(shared.hessian(order), expected[order][:, order])
    assert torch.equal(shared.diagonal(), expected.diagonal())
    assert torch.equal(shared.hessian(order.flip(0)), expected[order.flip(0)][:, order.flip(0)])
    assert torch.equal(shared.hessian(), expected)


def test_what_is_wrong_with_an_input_is_said_for_each_layer():
    shared = SharedInput(InputStatistics.empty(FEATURES))
    kept = quantize_or_keep(weight(0), shared, OWN, 1.0)
    assert kept.report.kept.startswith("saw 0 calibration tokens for 96 inputs")
    for _ in range(2):
        with pytest.raises(ValueError, match="saw no calibration token"):
            shared.hessian()
    with pytest.raises(ValueError, match=r"weight \[40, 95\] does not fit inputs of 96 features"):
        quantize_or_keep(weight(0)[:, :95], shared, OWN, 1.0)
