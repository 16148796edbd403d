"""Fine-tuning without labels, and from what was quantized after training."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div, one_hot

from dpq_core.convnet.images import load_images
from dpq_core.convnet.quantize import fine_tune, post_training
from dpq_core.convnet.recipe import (
    ActivationScheme,
    CalibrationSection,
    ConvScheme,
    ImagesSection,
    QatSection,
    TrainingSection,
    WeightScheme,
)
from dpq_core.convnet.train import fit, predict, seeded

CALIBRATION = CalibrationSection(batches=4)
TRAINING = TrainingSection(batch_size=32)
FOUR = ConvScheme(weights=WeightScheme(bits=4))
COARSE = ConvScheme(
    weights=WeightScheme(bits=4, per="layer", symmetric=False),
    activations=ActivationScheme(bits=4),
)


@pytest.fixture(scope="module")
def images():
    return load_images(ImagesSection(train_samples=800, test_samples=128))


@pytest.fixture(scope="module")
def network():
    """Of channels of different sizes, which four bits per layer do not hold."""
    with seeded(0):
        first, second = nn.Conv2d(1, 8, 3, bias=False), nn.Conv2d(8, 8, 3)
        made = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    with torch.no_grad():
        factors = torch.logspace(-0.7, 0.7, 8)
        first.weight *= factors[:, None, None, None]
        second.weight /= factors[None, :, None, None]
        made[-1].weight *= 10
    return made.eval()


def tuned(network, images, scheme, **fields):
    with seeded(0) as generator:
        section = QatSection(**fields)
        return fine_tune(network, images, scheme, TRAINING, section, CALIBRATION, generator)


def divergence(network, expected, images):
    """Nats a picture."""
    found, known = (predict(each, images).log_softmax(1) for each in (network, expected))
    return kl_div(found, known, reduction="batchmean", log_target=True)


def test_distillation_needs_no_labels(network, images):
    """The float network's own probabilities are what four bits learn again."""
    unlabelled = replace(images.train, labels=torch.zeros_like(images.train.labels))
    made = tuned(network, unlabelled, COARSE, epochs=2, learning_rate=0.003, loss="distillation")
    after = post_training(network, images.train, COARSE, CALIBRATION)
    found, before = (divergence(m.graph, network, images.test) for m in (made, after))
    assert found < 0.8 * before


def test_a_few_steps_end_nearer_where_they_start_from_what_was_quantized(network, images):
    few, found = images.train.first(128), {}
    for start in ("float", "post-training"):
        fields = {"epochs": 1, "learning_rate": 1e-4, "loss": "distillation", "start": start}
        made = tuned(network, few, FOUR, **fields)
        found[start] = divergence(made.graph, network, images.test)
    assert found["post-training"] < 0.8 * found["float"], found


def test_fine_tuning_that_moves_nothing_keeps_what_was_chosen_after_training(network, images):
    """Codes and the grid that they were chosen on, which may be wider than they are."""
    fields = {"epochs": 1, "learning_rate": 1e-12, "start": "post-training"}
    made = tuned(network, images.train.first(128), FOUR, **fields)
    after = post_training(network, images.train.first(128), FOUR, CALIBRATION)
    assert any(narrower(layer) for layer in after.layers.values())
    for name, layer in after.layers.items():
        torch.testing.assert_close(made.layers[name].weight, layer.weight)
        torch.testing.assert_close(made.layers[name].bias, layer.bias)
        torch.testing.assert_close(made.layers[name].rounding.scale, layer.rounding.scale)


def narrower(layer):
    """Whether the weight's own grid would be another than the one that it lies on."""
    scale, _ = layer.rounding.grid(layer.weight)
    return bool((scale < 0.99 * layer.rounding.scale).any())


def test_certain_probabilities_train_as_labels_do(images):
    few, trained = images.train.first(64), []
    for targets in (None, one_hot(few.labels, 10).float()):
        with seeded(0) as generator:
            network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
            fit(network, few, TRAINING, 1, 0.1, generator, targets=targets)
        trained.append(network.state_dict())
    torch.testing.assert_close(*trained)
