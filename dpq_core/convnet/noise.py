"""How far rounding moves what a layer gives, in decibels, and so which layers suffer most:

    SNR = 10 · log₁₀(Σ y² / Σ (y − ŷ)²)

y of the float graph, ŷ of the rounding one, each fed by its own layers before: noise adds up along
the network, and a layer that adds much stands out by the step down.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpq_core.convnet.graph import Prepared
from dpq_core.convnet.layer import Layer


@torch.no_grad()
def signal_to_noise(before: Prepared, after: Prepared, x: Tensor) -> dict[str, float]:
    """Decibels by the layer's name, in the order in which they are computed; infinite where nothing
    moved, which a part that is left in floating point does.

    Args:
        before, after: the same network, in floating point and rounding.
        x: an input.
    """
    expected, found = _outputs(before, x), _outputs(after, x)
    return {name: _decibels(expected[name], found[name]) for name in expected}


def worst(noise: dict[str, float], count: int = 10) -> dict[str, float]:
    """The layers of the least signal to noise, the worst first."""
    return dict(sorted(noise.items(), key=lambda row: row[1])[:count])


def _decibels(y: Tensor, rounded: Tensor) -> float:
    signal, noise = float(y.square().sum()), float((y - rounded).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _outputs(made: Prepared, x: Tensor) -> dict[str, Tensor]:
    """What each layer gives, before any activation."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Layer, Any, Tensor], None]:
        def hook(_layer: Layer, _inputs: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in made.layers.items()]
    try:
        made.graph(x)
    finally:
        for each in hooks:
            each.remove()
    return found
