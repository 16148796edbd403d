"""What rounding takes from a layer's outputs is given back, layer by layer, after training.

One batch of pictures goes once through the graph that rounds. At each layer, whose inputs are by
then what it will get when it runs,

    codes    of the weight are chosen for these inputs (`dpq_core.convnet.codes`);
    bias     takes the mean by which the layer's outputs now differ from those of the float graph,
             channel by channel (Nagel et al., 2019, section 4.2, on pictures)

and what goes on to the next layer are the outputs as mended.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dpq_core.convnet.codes import outputs_kept
from dpq_core.convnet.graph import Prepared
from dpq_core.convnet.layer import Layer


@torch.no_grad()
def channel_means(made: Prepared, x: Tensor) -> dict[str, Tensor]:
    """Of what each layer gives: name → [channels]."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Layer, Any, Tensor], None]:
        def hook(layer: Layer, _inputs: Any, y: Tensor) -> None:
            found[name] = _means(layer, y)

        return hook

    with ExitStack() as hooks:
        for name, layer in made.layers.items():
            hooks.enter_context(layer.register_forward_hook(keep(name)))
        made.graph(x)
    return found


@torch.no_grad()
def compensate(
    made: Prepared,
    x: Tensor,
    codes: bool,
    means: dict[str, Tensor] | None,
    only: Layer | None = None,
) -> Tensor:
    """Change a settled graph's weights, which stay on their grids, and biases; its logits for x.

    Args:
        x: an input; its activations are in memory at once.
        codes: whether to choose codes. means: `channel_means` of the float graph for x; None leaves
            biases.
    """

    def choose(layer: Layer, inputs: tuple[Tensor, ...]) -> None:
        if (weight := outputs_kept(layer, inputs[0])) is not None:
            layer.weight.copy_(weight)

    def correct(layer: Layer, _inputs: Any, y: Tensor) -> Tensor:
        assert means is not None
        off = means[layer.name] - _means(layer, y)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(off), requires_grad=False)
        layer.bias.add_(off)
        return y + (off.reshape(-1, *[1] * (y.dim() - 2)) if layer.convolution else off)

    with ExitStack() as hooks:
        for layer in [only] if only else made.layers.values():
            if codes:
                hooks.enter_context(layer.register_forward_pre_hook(choose))
            if means is not None:
                hooks.enter_context(layer.register_forward_hook(correct))
        logits: Tensor = made.graph(x)
    return logits


def _means(layer: Layer, y: Tensor) -> Tensor:
    """By channel: dimension 1 of a convolution, the last of a linear layer."""
    channel = 1 if layer.convolution else y.dim() - 1
    return y.mean([each for each in range(y.dim()) if each != channel])
