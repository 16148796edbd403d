"""More bits for the layers that lose most: measured, and solved as in the first pipeline.

    loss(layer, bits) = mean over pictures of KL( p(· | x) ‖ p'(· | x) )

with p the float network and p' the same with this layer's weight alone in so many bits, codes and
bias chosen as the scheme says. To first order losses of different layers add up. A budget of bits
goes to where their sum is least (`dpq_core.repair.allocation`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from dpq_core.convnet.compensation import channel_means, compensate
from dpq_core.convnet.graph import Prepared
from dpq_core.convnet.grids import WeightRounding
from dpq_core.convnet.recipe import Bits, ConvScheme
from dpq_core.repair.allocation import Option, least_loss


@dataclass(frozen=True)
class Trial:
    """One layer in so many bits. weights: how many it has. loss: nats a picture."""

    layer: str
    bits: Bits
    weights: int
    loss: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def trials(
    before: Prepared,
    scheme: ConvScheme,
    candidates: Sequence[Bits],
    x: Tensor,
    step: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """Every layer in the scheme's own bits and in those of each candidate.

    Args:
        before: the float graph, batch norm folded; as it was, afterwards. x: an input. step: called
            after each layer.
    """
    assert scheme.weights is not None
    expected = before.graph(x).double().log_softmax(1)
    means = channel_means(before, x) if scheme.corrects_biases else None
    found = []
    for name, layer in before.layers.items():
        weight, bias = layer.weight.data.clone(), layer.bias
        kept = None if bias is None else bias.data.clone()
        for bits in sorted({scheme.weights.bits, *candidates}):
            layer.rounding = WeightRounding(scheme.weights.in_bits(bits))
            layer.rounding.settle(layer.weight)
            logits = compensate(before, x, scheme.chooses_codes, means, only=layer)
            found_logs = logits.double().log_softmax(1)
            loss = kl_div(found_logs, expected, reduction="batchmean", log_target=True).item()
            found.append(Trial(name, bits, layer.weight.numel(), loss))
            layer.weight.data, layer.rounding, layer.bias = weight.clone(), None, bias
            if bias is not None and kept is not None:
                bias.data = kept.clone()
        step()
    return found


def bits_within(measured: Sequence[Trial], bits_per_weight: float) -> dict[str, Bits]:
    """The bits of every layer, of least loss, that take at most so many a weight on average.

    Raises:
        AllocationError: even the fewest bits take more.
    """
    options: dict[str, list[Option]] = {}
    for each in measured:
        row = options.setdefault(each.layer, [])
        row.append(Option(str(each.bits), each.weights * each.bits // 8, max(each.loss, 0.0)))
    total = sum({each.layer: each.weights for each in measured}.values())
    chosen = least_loss(options, int(total * bits_per_weight / 8)).choices
    known = {str(each.bits): each.bits for each in measured}
    return {layer: known[bits] for layer, bits in chosen.items()}


def mean_bits(measured: Sequence[Trial], scheme: ConvScheme) -> float:
    """Bits a weight under a scheme."""
    assert scheme.weights is not None
    sizes = {each.layer: each.weights for each in measured}
    bits = sum(count * scheme.weights.bits_of(name) for name, count in sizes.items())
    return bits / sum(sizes.values())


def raised(scheme: ConvScheme, bits: Mapping[str, Bits]) -> ConvScheme:
    """The scheme with these bits for layers where they are not its own."""
    assert scheme.weights is not None
    more = {name: each for name, each in bits.items() if each != scheme.weights.bits}
    return scheme.model_copy(update={"weights": scheme.weights.model_copy(update={"layers": more})})
