"""Codes and biases that keep a layer's outputs: the objective, and what it does for a network."""

import pytest
import torch
from torch import nn

from dpq_core.convnet.artifact import save_classifier
from dpq_core.convnet.codes import Grid, chosen, outputs_kept, second_moments
from dpq_core.convnet.compensation import channel_means
from dpq_core.convnet.executor import Classifier
from dpq_core.convnet.graph import prepared
from dpq_core.convnet.grids import Codes
from dpq_core.convnet.images import load_images
from dpq_core.convnet.networks import build_network
from dpq_core.convnet.quantize import post_training
from dpq_core.convnet.recipe import (
    CalibrationSection,
    ConvScheme,
    ImagesSection,
    NetworkSection,
    TrainingSection,
    WeightScheme,
)
from dpq_core.convnet.train import fit, predict, seeded

FOUR = Codes(-7, 7, 4)
FLOAT = ConvScheme(weights=None, activations=None)
CALIBRATION = CalibrationSection(batches=8, compensation_pictures=128)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Padded(nn.Module):
    """Zeros on one side of the pixels alone."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(4, 6, 3, padding=(1, 0), bias=False)

    def forward(self, x):
        return self.convolution(nn.functional.pad(x, (0, 2, 1, 0)))


@pytest.mark.parametrize(
    "network",
    [
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), bias=False),
        nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False),
        nn.Conv2d(4, 6, (2, 3), padding="valid", groups=2, bias=False),
        nn.Conv2d(4, 8, 3, groups=4, bias=False),
        Padded(),
        nn.Linear(9, 5, bias=False),
    ],
    ids=str,
)
def test_second_moments_are_those_of_a_layer_s_outputs(network):
    """mean y² = w H wᵀ, for every channel, whatever the geometry."""
    x = random(10, 4, 9, 9)
    (layer,) = prepared(network, x).layers.values()
    y = layer(x).detach().movedim(1 if layer.convolution else -1, 0).flatten(1)
    moments = second_moments(layer, x)
    weight = layer.weight.detach().flatten(1).reshape(len(moments), -1, moments.shape[-1])
    expected = torch.einsum("goi,gij,goj->go", weight, moments, weight).flatten()
    torch.testing.assert_close(y.square().mean(1), expected, rtol=1e-4, atol=1e-5)


def objective(weight, rounded, moments):
    error = rounded - weight
    return torch.einsum("goi,gij,goj->go", error, moments, error)


@pytest.fixture
def problem():
    """Correlated inputs of three groups, and a grid of seven steps to each side."""
    x = random(3, 400, 12) @ random(3, 12, 12, seed=1)
    weight = random(3, 5, 12, seed=2)
    scale = weight.abs().amax(2, keepdim=True) / 7
    return weight, Grid(scale, torch.zeros_like(scale), FOUR), x.mT @ x / 400


def test_chosen_codes_lose_less_than_the_nearest(problem):
    weight, grid, moments = problem
    found, nearest = chosen(*problem), grid.values(grid.steps(weight))
    assert torch.equal(grid.values(grid.steps(found)), found)
    before, after = (objective(weight, each, moments) for each in (nearest, found))
    assert (after < before).float().mean() > 0.9
    assert after.sum() < 0.75 * before.sum()


def test_no_single_step_lowers_the_objective_of_chosen_codes(problem):
    weight, grid, moments = problem
    found = chosen(*problem)
    damped = moments + torch.diag_embed(
        0.01 * moments.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(3, 12)
    )
    least = objective(weight, found, damped)
    for column in range(12):
        for step in (-1, 1):
            moved = found.clone()
            moved[:, :, column] += step * grid.scale[:, :, 0]
            moved = grid.values(grid.steps(moved))  # within the codes
            assert (objective(weight, moved, damped) >= least * (1 - 1e-3)).all()


def test_uncorrelated_inputs_and_weights_on_the_grid_take_the_nearest_codes(problem):
    weight, grid, moments = problem
    nearest = grid.values(grid.steps(weight))
    diagonal = torch.diag_embed(moments.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(chosen(weight, grid, diagonal), nearest)
    torch.testing.assert_close(chosen(nearest, grid, moments), nearest)
    torch.testing.assert_close(chosen(weight, grid, torch.zeros_like(moments)), nearest)


def test_other_dimensions_keep_the_nearest_codes():
    (layer,) = prepared(nn.Conv1d(3, 4, 3), random(4, 3, 9)).layers.values()
    assert outputs_kept(layer, random(4, 3, 9)) is None


@pytest.fixture(scope="module")
def images():
    return load_images(ImagesSection(train_samples=800, test_samples=300))


@pytest.fixture(scope="module")
def network(images):
    with seeded(0) as generator:
        made = build_network(NetworkSection(width=0.5), images.shape, 10).train()
        fit(made, images.train, TrainingSection(batch_size=32), 4, 0.1, generator)
    return made.eval()


@pytest.fixture(scope="module")
def float_graph(network, images):
    return post_training(network, images.train, FLOAT, CALIBRATION)


SCHEMES = {
    f"{bits} {per} {rounding} {bias}": ConvScheme(
        weights=WeightScheme(bits=bits, per=per, symmetric=per == "channel", rounding=rounding),
        bias_correction=bias,
    )
    for bits, per in ((4, "channel"), (8, "layer"))
    for rounding in ("nearest", "outputs")
    for bias in (False, True)
}


@pytest.fixture(scope="module")
def made(network, images):
    return {n: post_training(network, images.train, s, CALIBRATION) for n, s in SCHEMES.items()}


@pytest.mark.parametrize("grid", ["4 channel", "8 layer"])
def test_codes_and_biases_bring_the_logits_nearer(grid, made, float_graph, images):
    expected = predict(float_graph.graph, images.test)

    def off(rounding, bias):
        found = predict(made[f"{grid} {rounding} {bias}"].graph, images.test)
        return float((found - expected).norm() / expected.norm())

    nearest = off("nearest", False)
    assert off("outputs", False) < 0.98 * nearest
    assert off("nearest", True) < 0.9 * nearest
    assert off("outputs", True) < 0.85 * nearest


def test_a_corrected_bias_keeps_every_channel_s_mean(made, float_graph, images):
    x = images.train.inputs(slice(CALIBRATION.compensation_pictures))
    expected = channel_means(float_graph, x)
    corrected, plain = (
        channel_means(made[f"4 channel nearest {bias}"], x) for bias in (True, False)
    )
    for name, means in expected.items():
        torch.testing.assert_close(corrected[name], means, rtol=1e-3, atol=1e-3)
    assert max(float((plain[name] - expected[name]).abs().max()) for name in expected) > 0.05


def test_the_file_holds_what_was_chosen(made, images, tmp_path):
    found = made["4 channel outputs True"]
    save_classifier(tmp_path, found, images.train.inputs(slice(2)), {})
    simulated = predict(found.graph, images.test)
    written = predict(Classifier(tmp_path, "as written"), images.test)
    assert (written - simulated).norm() < 0.02 * simulated.norm()
