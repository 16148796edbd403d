"""Networks of torchvision and timm as they are, weights at random: structure and equality of forms.

They need neither's operations, and are tested where both lie (`pip install --no-deps torchvision
timm`, into a folder of PYTHONPATH). torchvision's wheel on the package index is linked with CUDA's
torch (libtorch_cuda.so): beside the CPU's its library does not load, so that `torchvision::nms` is
unknown, and importing it raises. Names of its operations, which no classifier calls, are enough.
"""

import pytest
import torch

from dpq_core.convnet.artifact import save_classifier
from dpq_core.convnet.executor import Classifier, kernel_counts
from dpq_core.convnet.images import Images
from dpq_core.convnet.quantize import post_training
from dpq_core.convnet.recipe import CalibrationSection, ConvScheme
from dpq_core.convnet.train import predict, seeded

FLOAT = ConvScheme(weights=None, activations=None)
CALIBRATION = CalibrationSection(batch_size=8, compensation_pictures=8)
NAMES = [  # name, convolutions and linear layers
    ("torchvision.resnet18", 21),
    ("torchvision.resnet50", 54),
    ("torchvision.mobilenet_v2", 53),
    ("torchvision.mobilenet_v3_small", 54),
    ("timm.mobilenetv1_100", 28),
]
_KEPT = []  # a library is forgotten with its object


def zoo(name):
    """A network's class by its name, and a skip where its package is not there."""
    package, _, model = name.partition(".")
    try:
        torch.ops.torchvision.nms  # noqa: B018
    except AttributeError:
        library = torch.library.Library("torchvision", "DEF")
        for known in ("nms", "qnms"):
            library.define(f"{known}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        _KEPT.append(library)
    pytest.importorskip("torchvision", reason="torchvision is not installed", exc_type=ImportError)
    if package == "torchvision":
        from torchvision import models

        return getattr(models, model)
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    return lambda: timm.create_model(model)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 3, 64, 64), generator=generator).to(torch.uint8)
    return Images(pixels, torch.zeros(16, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), NAMES, ids=[name for name, _ in NAMES])
def test_all_layers_run_in_integers_and_forms_agree(name, layers, images, tmp_path):
    with seeded(0), torch.no_grad():
        network = zoo(name)().train()
        network(images.inputs(slice(None)))  # batch norm gets statistics, and outputs a size
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        network(images.inputs(slice(None)))
    network.eval()
    exact = predict(network, images)
    graph = post_training(network, images, FLOAT, CALIBRATION).graph
    torch.testing.assert_close(predict(graph, images), exact, rtol=1e-3, atol=1e-3)
    made = post_training(network, images, ConvScheme(), CALIBRATION)
    assert (len(made.layers), made.left) == (layers, {})
    save_classifier(tmp_path, made, images.inputs(slice(2)), {})
    assert kernel_counts(tmp_path) == {"integer": layers, "float": 0}
    simulated, integers = predict(made.graph, images), predict(Classifier(tmp_path), images)
    rounding = (simulated - exact).norm()  # at random they amplify it
    assert 0 < rounding < 2 * simulated.norm()
    assert (integers - simulated).norm() <= rounding
