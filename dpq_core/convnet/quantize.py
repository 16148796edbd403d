"""A trained classifier to a graph that rounds: after training, or by fine-tuning.

Both ways end in the same kind of graph (`Rounding` → `Layer` …, batch norm folded, grids settled),
which `dpq_core.convnet.onnx_file` writes.

Fine-tuning (the whitepaper's section 3.2): weights and activations are rounded in the forward pass
and gradients go through as if they were not. In the last epochs batch norm is frozen to its running
statistics, as in inference. Networks are exported in inference: what drops out does not.

Few pictures, or few bits, want more than the labels and the float network to begin with: `qat.loss`
may be distillation, whose targets are what the float network says of the same pictures, and
`qat.start` the graph that was quantized after training, its codes and biases chosen and the grids
of its weights kept (one taken anew from chosen codes may be narrower, and move them all).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dpq_core.convnet.compensation import channel_means, compensate
from dpq_core.convnet.graph import Prepared, layers_of, prepared
from dpq_core.convnet.grids import Mode, Rounding, WeightRounding
from dpq_core.convnet.images import Images
from dpq_core.convnet.placing import place_roundings, strip
from dpq_core.convnet.ranges import range_of
from dpq_core.convnet.recipe import CalibrationSection, ConvScheme, QatSection, TrainingSection
from dpq_core.convnet.train import Step, fit, predict
from dpq_core.errors import InputError

_AT_ONCE = 32  # pictures, through the float network


class LayerError(InputError):
    """A layer that a scheme names and a network does not have."""


def post_training(
    network: nn.Module,
    images: Images,
    scheme: ConvScheme,
    calibration: CalibrationSection,
    step: Step = lambda: None,
) -> Prepared:
    """Quantize without training, on `calibration.batches` batches from the start of `images`.

    What weights and biases are given back (`dpq_core.convnet.compensation`) is found on
    `calibration.compensation_pictures` of these.

    With a scheme of neither weights nor activations: the float graph, batch norm folded.

    Raises:
        ExportError: the network does not export.
    """
    made = rounding_graph(network, images.inputs(slice(2)), scheme)
    _calibrate(made, images, scheme, calibration, step)
    return made


def _calibrate(
    made: Prepared,
    images: Images,
    scheme: ConvScheme,
    calibration: CalibrationSection,
    step: Step = lambda: None,
) -> None:
    """Settle a rounding graph, batch norm folded, and give back what rounding took."""
    graph, roundings = made.graph, {}
    for _, layer in layers_of(graph):
        layer.fold()
        if scheme.compensates:  # outputs will be the float graph's: so are their ranges
            roundings[layer], layer.rounding = layer.rounding, None
    x = images.inputs(slice(calibration.compensation_pictures))
    means = channel_means(made, x) if scheme.corrects_biases else None
    if scheme.activations:
        with torch.no_grad():
            for start in range(0, len(images), calibration.batch_size)[: calibration.batches]:
                graph(images.inputs(slice(start, start + calibration.batch_size)))
                step()
    for layer, rounding in roundings.items():
        layer.rounding = rounding
    _settle(graph)
    if scheme.compensates:
        compensate(made, x, scheme.chooses_codes, means)


def fine_tune(
    network: nn.Module,
    images: Images,
    scheme: ConvScheme,
    training: TrainingSection,
    qat: QatSection,
    calibration: CalibrationSection,
    generator: torch.Generator,
    step: Step = lambda: None,
) -> Prepared:
    """Quantization-aware training of the float network, which stays as it is.

    Args:
        calibration: where `qat.start` is post-training.

    Raises:
        ExportError: the network does not export.
    """
    targets = _probabilities(network, images) if qat.loss == "distillation" else None
    made = rounding_graph(network, images.inputs(slice(2)), scheme, training=True)
    graph = made.graph
    if qat.start == "post-training":
        _calibrate(made, images, scheme, calibration)
        graph.requires_grad_(True)
    _modes(graph, Mode.TRAIN)
    freeze_batch_norm(graph, False)
    average = _Average(graph, qat.average)

    def freeze(epoch: int) -> None:
        if epoch == qat.epochs - qat.frozen_epochs:
            freeze_batch_norm(graph, True)

    fit(
        graph,
        images,
        training,
        qat.epochs,
        qat.learning_rate,
        generator,
        step,
        after_step=average.update,
        before_epoch=freeze,
        targets=targets,
    )
    average.apply()
    freeze_batch_norm(graph, True)
    for _, layer in layers_of(graph):
        layer.fold()
    _settle(graph)
    return made


def rounding_graph(
    network: nn.Module, example: Tensor, scheme: ConvScheme, training: bool = False
) -> Prepared:
    """The network's graph with a scheme's roundings in it; those of activations watch."""
    made = prepared(network, example)
    strip(made.graph)
    if weights := scheme.weights:
        _check_names(weights.layers, made)
        for name, layer in layers_of(made.graph):
            layer.rounding = WeightRounding(weights.in_bits(weights.bits_of(name)))
    if activations := scheme.activations:
        place_roundings(
            made.graph, lambda: Rounding(activations.bits, range_of(activations, training))
        )
    return made


def _check_names(layers: Iterable[str], made: Prepared) -> None:
    """Raises LayerError for one that the network does not have."""
    for name in layers:
        if name not in made.layers:
            raise LayerError(
                f"scheme.weights.layers names {name}, and the network has"
                f" {', '.join(sorted(made.layers))}"
            )


def freeze_batch_norm(graph: GraphModule, frozen: bool) -> None:
    """From here on batch norm uses its running statistics and leaves them as they are, or uses the
    batch's and averages them."""
    for _, layer in layers_of(graph):
        if layer.norm is not None:
            layer.norm.frozen = frozen


def _modes(graph: GraphModule, mode: Mode) -> None:
    for module in graph.modules():
        if isinstance(module, Rounding):
            module.mode = mode


def _settle(graph: GraphModule) -> None:
    """In inference, on the grids of what was seen. Weights that have a grid keep it."""
    for module in graph.modules():
        if isinstance(module, Rounding):
            module.settle()
    for _, layer in layers_of(graph):
        if layer.rounding is not None and layer.rounding.scale is None:
            layer.rounding.settle(layer.weight)
    _modes(graph, Mode.ROUND)
    graph.requires_grad_(False).eval()


def _probabilities(network: nn.Module, images: Images) -> Tensor:
    """What the float network says of the images: fp32 [n, classes]."""
    graph = prepared(network, images.inputs(slice(2))).graph
    return predict(graph, images, _AT_ONCE).softmax(1)


class _Average:
    """Moving average of the parameters; nothing where decay is None."""

    def __init__(self, graph: GraphModule, decay: float | None) -> None:
        self._parameters: list[Tensor] = list(graph.parameters())
        self._decay = decay
        self._averages = [p.detach().clone() for p in self._parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        if self._decay:
            torch._foreach_lerp_(self._averages, self._parameters, 1 - self._decay)

    @torch.no_grad()
    def apply(self) -> None:
        for parameter, average in zip(self._parameters, self._averages, strict=False):
            parameter.copy_(average)
