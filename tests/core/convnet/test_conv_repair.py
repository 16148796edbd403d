"""More bits for the layers that lose most, within a budget."""

import pytest
import torch
from torch import nn

from dpq_core.convnet.grids import weight_codes
from dpq_core.convnet.images import Images
from dpq_core.convnet.quantize import LayerError, post_training
from dpq_core.convnet.recipe import (
    CalibrationSection,
    ConvRecipe,
    ConvScheme,
    WeightScheme,
)
from dpq_core.convnet.repair import Trial, bits_within, mean_bits, raised, trials
from dpq_core.convnet.train import predict, seeded
from dpq_core.recipe import RecipeError, validated
from dpq_core.repair.allocation import AllocationError

FLOAT = ConvScheme(weights=None, activations=None)
FOUR = ConvScheme(weights=WeightScheme(bits=4))


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 1, 8, 8), generator=generator).to(torch.uint8)
    return Images(pixels, torch.zeros(64, dtype=torch.long))


@pytest.fixture(scope="module")
def network():
    """Its second layer has channels of very different sizes within each row, which four bits do not
    tell apart."""
    with seeded(0):
        first, second = nn.Conv2d(1, 8, 3, bias=False), nn.Conv2d(8, 8, 3)
        made = nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(128, 5)).eval()
    with torch.no_grad():
        factors = torch.logspace(-1.5, 1.5, 8)
        first.weight *= factors[:, None, None, None]
        second.weight /= factors[None, :, None, None]
    return made


@pytest.fixture(scope="module")
def measured(network, images):
    before = post_training(network, images, FLOAT, CalibrationSection())
    expected = predict(before.graph, images)
    found = trials(before, FOUR, [8, 16], images.inputs(slice(32)))
    torch.testing.assert_close(predict(before.graph, images), expected, rtol=0, atol=0)
    assert all(layer.rounding is None for layer in before.layers.values())
    assert before.layers["0"].bias is None
    return found


def test_every_layer_loses_less_with_more_bits(measured):
    assert [each.layer for each in measured[::3]] == ["0", "2", "4"]
    for four, eight, sixteen in zip(measured[::3], measured[1::3], measured[2::3], strict=True):
        assert [four.bits, eight.bits, sixteen.bits] == [4, 8, 16]
        assert four.loss > 2 * abs(eight.loss)
        assert abs(sixteen.loss) < 0.01 * four.loss


def test_the_worst_layer_has_the_largest_loss_and_is_raised_first(measured):
    four = {each.layer: each.loss for each in measured if each.bits == 4}
    assert max(four, key=four.get) == "2"
    sizes = {each.layer: each.weights for each in measured}
    assert sizes == {"0": 72, "2": 576, "4": 640}
    budget = 4 + 4 * 576 / sum(sizes.values())
    bits = bits_within(measured, budget + 0.01)
    assert bits == {"0": 4, "2": 8, "4": 4}
    scheme = raised(FOUR, bits)
    assert scheme.weights.layers == {"2": 8}
    assert mean_bits(measured, FOUR) == 4
    assert mean_bits(measured, scheme) == pytest.approx(budget)


@pytest.mark.parametrize("budget", [4, 5, 6.5, 8, 11, 16])
def test_a_budget_is_kept(measured, budget):
    scheme = raised(FOUR, bits_within(measured, budget))
    assert mean_bits(measured, scheme) <= budget
    with pytest.raises(AllocationError):
        bits_within(measured, 3.9)


def test_raised_layers_are_made_in_their_bits_and_bring_the_logits_nearer(network, images):
    scheme = ConvScheme(weights=WeightScheme(bits=4, layers={"2": 8}), activations=None)
    made = post_training(network, images, scheme, CalibrationSection())
    assert {n: layer.rounding.codes.bits for n, layer in made.layers.items()} == {
        "0": 4,
        "2": 8,
        "4": 4,
    }
    expected = predict(network, images)
    four = post_training(network, images, FOUR, CalibrationSection())
    off, before = ((predict(m.graph, images) - expected).norm() for m in (made, four))
    assert off < 0.7 * before


@pytest.mark.parametrize(("saturates", "eight"), [(True, 63), (False, 127)])
def test_only_eight_bits_leave_one_out_where_sums_saturate(saturates, eight):
    weights = ConvScheme(weights=WeightScheme(bits=4, layers={"2": 8})).on(saturates).weights
    highest = [weight_codes(weights.in_bits(weights.bits_of(name))).high for name in ("1", "2")]
    assert highest == [7, eight]


def test_an_unknown_layer_is_named(network, images):
    scheme = ConvScheme(weights=WeightScheme(layers={"head": 16}))
    with pytest.raises(LayerError, match=r"names head, and the network has 0, 2, 4"):
        post_training(network, images, scheme, CalibrationSection())


def test_no_weights_no_repair():
    with pytest.raises(RecipeError, match="repair gives weights more bits"):
        validated(ConvRecipe, {"scheme": {"weights": None}, "repair": {"enabled": True}}, "recipe")


def test_losses_below_zero_are_none():
    """Rounding of sums can make them so, and no layer is paid for being rounded."""
    one = [Trial("a", 4, 8, -1e-9), Trial("a", 8, 8, 0.0)]
    assert bits_within(one, 8) == {"a": 4}
