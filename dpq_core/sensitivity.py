"""What each layer costs: the change in the model's predictions when it alone is quantized.

    loss(layer, choice) = mean over tokens of KL( p16(· | x) ‖ p(· | x) )

with p16 the 16-bit model and p the same model with this one layer quantized so, on calibration
tokens, in nats a token. Forward passes only. One pass through the blocks before a layer's own,
which are unchanged, serves all layers of the block; the passes after it run side by side, a block's
weights read once for all of them.

To first order the loss is what the logarithm of perplexity rises by on the model's own kind of
text, and losses of different layers add up as long as they are small (`dpq_core.allocation`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dpq_core.quantize import QuantizedLinear
from dpq_core.streaming import StreamedModel


@dataclass(frozen=True)
class Variant:
    """One layer quantized in one way. name: the layer's full name."""

    name: str
    choice: str


def block_losses(
    stream: StreamedModel,
    block: int,
    hidden: Tensor,  # [windows, length, hidden], before the block; not changed
    variants: Mapping[Variant, Callable[[], QuantizedLinear]],
    batch_size: int,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[Variant, float]:
    """The loss of each variant of a block's layers, in nats a token.

    Memory: a copy of `hidden` for each variant and one more. `on_progress` is called after each
    block that was passed, the output head included.

    Raises:
        ValueError: the 16-bit model's predictions are not finite.
    """
    states: dict[Variant | None, Tensor] = {None: hidden.clone()}
    with stream.block(block):
        stream.advance(states[None], batch_size)
    for variant, layer in variants.items():
        states[variant] = hidden.clone()
        with stream.block(block, {variant.name: layer()}):
            stream.advance(states[variant], batch_size)
    on_progress()
    for later in range(block + 1, stream.block_count):
        with stream.block(later):
            for state in states.values():
                stream.advance(state, batch_size)
        on_progress()
    reference = states.pop(None)
    losses = _divergences(stream, reference, states)
    on_progress()
    return {variant: losses[variant] for variant in variants}


def _divergences(
    stream: StreamedModel, reference: Tensor, states: Mapping[Variant | None, Tensor]
) -> dict[Variant | None, float]:
    """KL from the reference's predictions to each state's, a window's logits at a time."""
    sums = dict.fromkeys(states, 0.0)
    with stream.head() as logits_of:
        for window in range(len(reference)):
            expected = logits_of(reference[window : window + 1]).float().log_softmax(-1)
            if not torch.isfinite(expected).all():
                raise ValueError("the 16-bit model's predictions are not finite")
            for variant, state in states.items():
                found = logits_of(state[window : window + 1]).float().log_softmax(-1)
                divergence = (expected.exp() * (expected - found)).sum(-1)
                sums[variant] += divergence.double().sum().item()
    tokens = reference.shape[0] * reference.shape[1]
    return {variant: max(total / tokens, 0.0) for variant, total in sums.items()}
