"""What each layer costs: the change in the model's predictions when it alone is quantized.

    loss(layer, choice) = mean over tokens of KL( p16(· | x) ‖ p(· | x) )

with p16 the 16-bit model and p the same model with this one layer quantized so, on calibration
tokens, in nats a token. Forward passes only. One pass through the blocks before a layer's own,
which are unchanged, serves all layers of the block; the passes after it run side by side, a block's
weights read once for all of them.

To first order the loss is what the logarithm of perplexity rises by on the model's own kind of
text, and losses of different layers add up as long as they are small
(`dpq_core.repair.allocation`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dpq_core.layer.records import QuantizedLinear
from dpq_core.model.inputs import Batch
from dpq_core.model.streaming import StreamedModel


@dataclass(frozen=True)
class Trial:
    """One layer quantized in one way. name: the layer's full name."""

    name: str
    choice: str


def block_losses(
    stream: StreamedModel,
    block: int,
    batches: Sequence[Batch],  # before the block; not changed
    trials: Mapping[Trial, Callable[[], QuantizedLinear]],
    on_progress: Callable[[], None] = lambda: None,
) -> dict[Trial, float]:
    """The loss of each trial of a block's layers, in nats a token.

    Memory: a copy of the hidden states for each trial and one more. `on_progress` is called after
    each block that was passed, the output head included.

    Raises:
        ValueError: the 16-bit model's predictions are not finite.
    """
    states: dict[Trial | None, list[Batch]] = {None: [batch.clone() for batch in batches]}
    with stream.block(block):
        stream.advance(states[None])
    for trial, layer in trials.items():
        states[trial] = [batch.clone() for batch in batches]
        with stream.block(block, {trial.name: layer()}):
            stream.advance(states[trial])
    on_progress()
    for later in range(block + 1, stream.block_count):
        with stream.block(later):
            for state in states.values():
                stream.advance(state)
        on_progress()
    reference = states.pop(None)
    losses = _divergences(stream, reference, states)
    on_progress()
    return {trial: losses[trial] for trial in trials}


def _divergences(
    stream: StreamedModel,
    reference: Sequence[Batch],
    states: Mapping[Trial | None, Sequence[Batch]],
) -> dict[Trial | None, float]:
    """KL from the reference's predictions to each state's, a window's logits at a time."""
    sums, tokens = dict.fromkeys(states, 0.0), 0
    with stream.head() as logits_of:
        for number, batch in enumerate(reference):
            for window in range(len(batch.hidden)):
                one = slice(window, window + 1)
                expected = logits_of(batch.hidden[one]).float().log_softmax(-1)
                if not torch.isfinite(expected).all():
                    raise ValueError("the 16-bit model's predictions are not finite")
                tokens += expected.shape[1]
                for trial, state in states.items():
                    found = logits_of(state[number].hidden[one]).float().log_softmax(-1)
                    divergence = (expected.exp() * (expected - found)).sum(-1)
                    sums[trial] += divergence.double().sum().item()
    return {trial: max(total / tokens, 0.0) for trial, total in sums.items()}
