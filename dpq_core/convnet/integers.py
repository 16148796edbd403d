"""A quantized graph as integer arithmetic: oneDNN's kernels, as torch brings them for x86.

    q_y = round(act(s_x · s_w · Σ (q_x − z_x) · q_w + b) / s_y) + z_y      q_x, q_y uint8, q_w int8

torchao's lowering turns "dequantize → convolution" into `onednn.qconv_pointwise`, the same with an
addition into its `binary` form, and linear layers into `onednn.qlinear_pointwise`: sums in int32,
weights laid out beforehand, no compiler. It leaves ReLU, ReLU6 and the next quantization to
Inductor's C++. Here these become part of the kernel, so that what travels between layers is uint8.
Left in floating point are the first quantization, the mean over pixels, and the logits.

The result is the graph's but for the order of roundings: a release counts the held-out images for
which the two give different classes.
"""

import time
import warnings
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

from dpq_core.convnet.artifact import ArtifactError, load_classifier, read_manifest

_ACTIVATIONS: dict[Any, str] = {
    torch.ops.aten.relu.default: "relu",
    torch.ops.aten.hardtanh.default: "hardtanh",
}
# Place of the output's scale among the arguments; zero point, type, activation, its numbers follow.
_KERNELS = {
    torch.ops.onednn.qconv_pointwise.default: 11,
    torch.ops.onednn.qlinear_pointwise.default: 7,
}
_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_FLOATING = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
_WARM_UP = 5  # runs before those that are timed


class IntegerClassifier:
    """An artifact in integer arithmetic, for `batch_size` images at a time; fewer are filled up.

    Raises:
        ArtifactError: no artifact, or a layer that the integer kernels do not take.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        shape = read_manifest(folder)["input"]["shape"]
        self.batch_size = batch_size
        self.graph = lowered(load_classifier(folder), torch.zeros(batch_size, *shape))
        kernels = kernel_counts(self.graph)
        if kernels["float"] or not kernels["integer"]:
            raise ArtifactError(
                f"{folder}: {kernels['float']} layers would run in floating point: integer kernels"
                " take 8-bit activations and 8-bit weights per channel, symmetric"
            )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """fp32 [n, channels, height, width] → logits fp32 [n, classes]."""
        parts = []
        for part in x.split(self.batch_size):
            missing = self.batch_size - len(part)
            filled = (
                torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            )
            parts.append(self.graph(filled)[: len(part)])
        return torch.cat(parts)


def lowered(graph: GraphModule, example: Tensor) -> GraphModule:
    """The graph on integer kernels, for inputs of the example's shape."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        integers = cast(GraphModule, lower_pt2e_quantized_to_x86(graph, (example,)))
    _fuse(integers)
    return integers


def kernel_counts(graph: GraphModule) -> Mapping[str, int]:
    """How many convolutions and linear layers run in integers, and how many in floating point."""
    targets = [node.target for node in graph.graph.nodes]
    return {
        "integer": sum(target in _KERNELS for target in targets),
        "float": sum(target in _FLOATING for target in targets),
    }


def latencies(
    models: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, runs: int
) -> dict[str, float]:
    """Median milliseconds of each model on `x`, the models timed in turn so that a busy machine is
    busy for all of them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for run in range(runs + _WARM_UP):
            for name, model in models.items():
                start = time.perf_counter()
                model(x)
                if run >= _WARM_UP:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def _fuse(graph: GraphModule) -> None:
    """What only follows a kernel becomes part of it: an activation, the next quantization."""
    for node in list(graph.graph.nodes):
        if node.target not in _KERNELS:
            continue
        arguments, place, last = list(node.args), _KERNELS[node.target], node
        if (activation := _only_user(last, _ACTIVATIONS)) is not None:
            name = _ACTIVATIONS[activation.target]
            arguments[place + 3 : place + 5] = [name, list(activation.args[1:])]
            last = activation
        if (quantized := _only_user(last, (_QUANTIZE,))) is not None and _is_byte(quantized):
            _, scale, zero_point, *_, dtype = quantized.args
            arguments[place : place + 3] = [scale, zero_point, dtype]
            last = quantized
        node.args = tuple(arguments)
        if last is not node:
            last.replace_all_uses_with(node)
            graph.graph.eliminate_dead_code()
    graph.recompile()


def _only_user(node: Node, targets: Container[Any]) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in targets else None


def _is_byte(node: Node) -> bool:
    """Whether a quantization (or its inverse) uses all of uint8."""
    return node.args[3:6] == (0, 255, torch.uint8)
