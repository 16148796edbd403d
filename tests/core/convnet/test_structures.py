"""Networks as people write them: what each computes is quantized, whatever its classes are."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dpq_core.convnet.artifact import save_classifier, weight_sizes
from dpq_core.convnet.executor import Classifier, kernel_counts
from dpq_core.convnet.files import MODEL
from dpq_core.convnet.graph import prepared
from dpq_core.convnet.grids import Rounding
from dpq_core.convnet.images import Images
from dpq_core.convnet.quantize import post_training
from dpq_core.convnet.recipe import CalibrationSection, ConvScheme
from dpq_core.convnet.train import predict, seeded

FLOAT = ConvScheme(weights=None, activations=None)


class SameConv(nn.Conv2d):
    """TensorFlow's "same", as EfficientNet's ports have it: a subclass that pads by itself."""

    def forward(self, x):
        (size, step), (high, wide) = (self.kernel_size[0], self.stride[0]), x.shape[-2:]
        down, right = (max((-(-n // step) - 1) * step + size - n, 0) for n in (high, wide))
        x = functional.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
        return functional.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class StandardConv(nn.Conv2d):
    """A weight that is standardized at each call."""

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, (self.weight - mean) / 0.3, self.bias, padding=1)


class Everything(nn.Module):
    """A block of each kind: MobileNet-V3's with squeeze-and-excite, ResNet's addition, Inception's
    concatenation, ShuffleNet's shuffle, with one activation module for all."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU6()
        self.stem = SameConv(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3)
        self.depthwise = SameConv(8, 8, 5, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 8, 1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.standard = StandardConv(16, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        y = functional.hardswish(self.depthwise(x))
        scale = self.excite(functional.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        y = self.project(y * functional.hardsigmoid(scale))
        x = self.act(x + y)
        x = torch.cat([self.act(self.left(x)), self.act(self.right(x))], 1)
        x = functional.max_pool2d(x, 2)
        n, c, high, wide = x.shape
        x = x.view(n, 2, c // 2, high, wide).transpose(1, 2).reshape(n, c, high, wide)
        x = functional.silu(self.grouped(x))
        x = self.standard(x)
        return self.head((x * torch.sigmoid(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 3, 20, 20), generator=generator).to(torch.uint8)
    return Images(pixels, torch.zeros(16, dtype=torch.long))


@pytest.fixture(scope="module")
def network():
    with seeded(0):
        made = Everything()
        made.norm.running_mean.normal_()
        made.norm.running_var.uniform_(0.5, 2)
        return made.eval()


@pytest.fixture(scope="module")
def made(network, images):
    return post_training(network, images, ConvScheme(), CalibrationSection(batch_size=8))


def test_every_layer_is_found_by_its_name(network, images):
    found = prepared(network, images.inputs(slice(2)))
    layers = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {name.partition(" ")[0] for name in found.layers} | {"standard"} >= layers
    assert len(found.layers) == len(layers)
    assert found.left == {}


def test_the_float_graph_is_the_network(network, images):
    graph = post_training(network, images, FLOAT, CalibrationSection()).graph
    torch.testing.assert_close(predict(graph, images), predict(network, images))


def test_all_of_it_runs_in_integers(network, made, images, tmp_path):
    save_classifier(tmp_path, made, images.inputs(slice(2)), {})
    assert kernel_counts(tmp_path) == {"integer": len(made.layers), "float": 0}
    assert weight_sizes(tmp_path / MODEL).float_layers == ()
    simulated, exact = predict(made.graph, images), predict(network, images)
    assert (predict(Classifier(tmp_path), images) - simulated).norm() < 0.05 * simulated.norm()
    assert (simulated - exact).norm() < 0.2 * exact.norm()


def test_what_is_concatenated_shares_a_grid(made):
    nodes = made.graph.graph.nodes
    (joined,) = [node for node in nodes if node.target is torch.ops.aten.cat.default]
    before = {str(node.target) for node in joined.args[0]}
    (after,) = joined.users
    assert before == {str(after.target)}
    assert isinstance(made.graph.get_submodule(str(after.target)), Rounding)


class Mixed(nn.Module):
    """Joins what a ReLU gave with what is below zero too."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.cat([functional.relu(self.left(x)), self.right(x)], 1).mean((2, 3))


def test_a_relu_stays_a_part_of_its_layer_before_a_concatenation(images, tmp_path):
    made = post_training(Mixed().eval(), images, ConvScheme(), CalibrationSection())
    save_classifier(tmp_path, made, images.inputs(slice(2)), {})
    assert kernel_counts(tmp_path) == {"integer": 2, "float": 0}


def test_what_cannot_be_quantized_is_named_with_its_reason(images):
    up = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 2, 3)).eval()
    found = prepared(up, images.inputs(slice(2)))
    assert found.layers.keys() == {"0", "2"}
    assert found.left == {"1": "transposed convolutions have no integer kernels"}
