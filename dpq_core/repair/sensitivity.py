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
from itertools import product

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

    Memory: a copy of the hidden states for each trial and one more, and five tensors of `_LOGITS`
    in FP32. `on_progress` is called after
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
    """KL from the reference's predictions to each state's, of a window or a part of it at a
    time."""
    sums, tokens = dict.fromkeys(states, 0.0), 0
    vocabulary = stream.parameters[f"{stream.anatomy.parts.embedding}.weight"][0]
    rows = max(1, _LOGITS // vocabulary)
    with stream.head() as logits_of:
        for number, batch in enumerate(reference):
            windows, length = batch.hidden.shape[:2]
            for window, first in product(range(windows), range(0, length, rows)):
                some = slice(window, window + 1), slice(first, first + rows)
                expected = logits_of(batch.hidden[some]).float().log_softmax(-1)
                if not torch.isfinite(expected).all():
                    raise ValueError("the 16-bit model's predictions are not finite")
                tokens += expected.shape[1]
                for trial, state in states.items():
                    found = logits_of(state[number].hidden[some]).float().log_softmax(-1)
                    divergence = (expected.exp() * (expected - found)).sum(-1)
                    sums[trial] += divergence.double().sum().item()
    return {trial: max(total / tokens, 0.0) for trial, total in sums.items()}


_LOGITS = 1 << 25  # at a time, for a vocabulary of 262,144 those of 128 tokens
