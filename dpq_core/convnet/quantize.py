"""A trained classifier to a quantized graph: after training, or by fine-tuning.

Both ways end in the same kind of graph (quantize → dequantize → convolution …, batch norm folded),
by torchao's PT2E: export, prepare, then calibrate or train, convert.

Fine-tuning (the whitepaper's section 3.2): weights and activations are rounded in the forward pass
and gradients go through as if they were not (straight-through). A convolution and its batch norm
become one: the weight is scaled by γ/σ of the *running* statistics before it is rounded, and the
output scaled back for the batch's own; in the last epochs the batch norm is frozen to the running
ones, as in inference.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.fx import GraphModule
from torchao.quantization.pt2e.export_utils import _move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

from dpq_core.convnet.images import Images, as_input
from dpq_core.convnet.quantizer import SchemeQuantizer
from dpq_core.convnet.recipe import CalibrationSection, ConvScheme, QatSection, TrainingSection
from dpq_core.convnet.train import Step, fit
from dpq_core.errors import InputError, one_line

_BATCH_NORM = torch.ops.aten.batch_norm.default
_VARIANCE, _TRAINING, _CONSTANT = 4, 5, 7  # places of batch_norm's arguments
_EPS = nn.BatchNorm2d(1).eps
_MOST = 2**16  # images at a time


class ExportError(InputError):
    """A network that torch.export does not take."""


def post_training(
    network: nn.Module,
    images: Images,
    scheme: ConvScheme,
    calibration: CalibrationSection,
    step: Step = lambda: None,
) -> GraphModule:
    """Quantize without training, on `calibration.batches` batches from the start of `images`.

    With a scheme of neither weights nor activations: the float graph, batch norm folded.
    """
    with _quiet():
        graph = exported(network.eval(), as_input(images.pixels[:2]))
        prepared = prepare_pt2e(graph, SchemeQuantizer(scheme, training=False))
        batches = images.pixels.split(calibration.batch_size)[: calibration.batches]
        with torch.no_grad():
            for batch in batches:
                prepared(as_input(batch))
                step()
        return cast(GraphModule, convert_pt2e(prepared))


def fine_tune(
    network: nn.Module,
    images: Images,
    scheme: ConvScheme,
    training: TrainingSection,
    qat: QatSection,
    generator: torch.Generator,
    step: Step = lambda: None,
) -> GraphModule:
    """Quantization-aware training from the float network, which stays as it is."""
    with _quiet():
        graph = training_graph(network, as_input(images.pixels[:2]))
        prepared = prepare_qat_pt2e(graph, SchemeQuantizer(scheme, training=True))
        average = _Average(prepared, qat.average)

        def freeze(epoch: int) -> None:
            if epoch == qat.epochs - qat.frozen_epochs:
                train_batch_norm(prepared, False)

        fit(
            prepared,
            images,
            training,
            qat.epochs,
            qat.learning_rate,
            generator,
            step,
            after_step=average.update,
            before_epoch=freeze,
        )
        average.apply()
        train_batch_norm(prepared, False)
        _move_exported_model_to_eval(prepared)
        _observe_weights_once(prepared, as_input(images.pixels[: training.batch_size]))
        return cast(GraphModule, convert_pt2e(prepared))


def training_graph(network: nn.Module, example: Tensor) -> GraphModule:
    """A copy to fine-tune: batch norm over the batch, with the constant that torchao knows."""
    graph = exported(copy.deepcopy(network).train(), example)
    train_batch_norm(graph, True)
    _usual_constant(graph)
    return graph


def exported(network: nn.Module, example: Tensor) -> GraphModule:
    """The network's graph, for any number of images; of a graph a copy.

    Raises:
        ExportError: torch.export's first line.
    """
    if isinstance(network, GraphModule):  # an archive's
        return copy.deepcopy(network)
    try:
        program = export(network, (example,), dynamic_shapes=({0: Dim("batch", min=1, max=_MOST)},))
    except Exception as error:  # of the compiler's many
        reason = one_line(error, 300)
        raise ExportError(f"the network does not export: {reason}") from error
    return program.module()


def train_batch_norm(graph: GraphModule, training: bool) -> None:
    """From here on batch norm uses the batch's statistics and averages them, or uses its running
    statistics and leaves them as they are."""
    for node in graph.graph.nodes:
        if node.target is _BATCH_NORM:
            node.update_arg(_TRAINING, training)
    graph.recompile()


@torch.no_grad()
def _usual_constant(graph: GraphModule) -> None:
    """Batch norm with torch's own constant, and running statistics that make up for it: torchao's
    fine-tuning knows no other, and takes it whatever the network says."""
    for node in graph.graph.nodes:
        if node.target is _BATCH_NORM:
            variance = graph.get_buffer(node.args[_VARIANCE].target)
            variance += node.args[_CONSTANT] - _EPS
            node.update_arg(_CONSTANT, _EPS)
    graph.recompile()


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


@torch.no_grad()
def _observe_weights_once(graph: GraphModule, x: Tensor) -> None:
    """Ranges of the weights as they are at the end, not before the last step."""
    graph(x)


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao and torch warn of each other's deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
