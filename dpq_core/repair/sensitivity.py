"""What each layer costs: the change in the model's predictions when it alone is quantized.

    loss(layer, choice) = mean over tokens of KL( p16(· | x) ‖ p(· | x) )

with p16 the 16-bit model and p the same model with this one layer quantized so, on calibration
tokens, in nats a token. Forward passes only. One pass through the blocks before a layer's own,
which are unchanged, serves all layers of the block; the passes after it run side by side, a block's
weights read once for all of them. Of a large vocabulary some pieces stand for all
(`dpq_core.evaluation.sampled_pieces`): a head of 262,144 costs more than a small model's blocks.

Run the model in FP32 (`StreamedModel`'s `dtype`): in 16 bits the least change of a layer turns
roundings in all that follows, which alone cost SmolLM2-135M 0.0013 nats a layer, where INT8 weights
cost 0.00001 (`docs/log.md`).

To first order the loss is what the logarithm of perplexity rises by on the model's own kind of
text, and losses of different layers add up as long as they are small
(`dpq_core.repair.allocation`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpq_core.evaluation.divergence import Divergence, divergences
from dpq_core.evaluation.head import head_tiles
from dpq_core.evaluation.sampled_pieces import sample_pieces
from dpq_core.layer.records import QuantizedLinear
from dpq_core.model.inputs import Batch, ModelInputs
from dpq_core.model.streaming import StreamedModel

SAMPLED = 4_096  # pieces of a vocabulary, where it has more


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

    Memory: a copy of the hidden states for each trial and one more, and of each a tile of logits
    (`dpq_core.evaluation.head`). `on_progress` is called after each block that was passed, the
    output head included.

    Raises:
        ValueError: the 16-bit model's predictions are not finite.
    """
    states = last_states(stream, block, batches, trials, on_progress)
    reference = states.pop(None)
    sample = sample_pieces(stream, reference, SAMPLED)
    with head_tiles(stream, sample=sample) as tiles:
        found = divergences(tiles, reference, [(tiles, states[trial]) for trial in trials])
    on_progress()
    return _means(trials, found)


def last_states(
    stream: StreamedModel,
    block: int,
    batches: Sequence[Batch],  # before the block; not changed
    trials: Mapping[Trial, Callable[[], QuantizedLinear]],
    on_progress: Callable[[], None] = lambda: None,
) -> dict[Trial | None, Tensor]:
    """Hidden states after the last block, [tokens, hidden]: of the 16-bit model (None), and of each
    trial of the block's layers."""
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
    return {trial: _flat(state) for trial, state in states.items()}


def outside_losses(
    stream: StreamedModel,
    inputs: Sequence[ModelInputs],
    trials: Mapping[Trial, Callable[[], QuantizedLinear]],
    on_progress: Callable[[], None] = lambda: None,
) -> dict[Trial, float]:
    """The loss of each trial of the output head or the embedding (of both, where they are tied),
    one after the other: two heads are in memory at a time. `on_progress` is called after each.

    Raises:
        ValueError: the 16-bit model's predictions are not finite.
    """
    parts = stream.anatomy.parts
    reference, found = _last_states(stream, inputs), list[Divergence]()
    with head_tiles(stream) as tiles:
        for trial, layer in trials.items():
            with stream.outside.trying(trial.name, layer()):
                looked_up = stream.outside.quantized(parts.embedding)
                states = _last_states(stream, inputs) if looked_up else reference
                with head_tiles(stream) as theirs:
                    found += divergences(tiles, reference, [(theirs, states)])
            on_progress()
    return _means(trials, found)


def _last_states(stream: StreamedModel, inputs: Sequence[ModelInputs]) -> Tensor:
    """Hidden states after the last block, [tokens, hidden]."""
    batches = stream.begin(inputs)
    for block in range(stream.block_count):
        with stream.block(block):
            stream.advance(batches)
    return _flat(batches)


def _means(trials: Iterable[Trial], found: Sequence[Divergence]) -> dict[Trial, float]:
    if found and not torch.stack([each.nats for each in found]).isfinite().any(0).all():
        raise ValueError("the 16-bit model's predictions are not finite")  # of a token, to no trial
    return {trial: each.nats.mean().item() for trial, each in zip(trials, found, strict=True)}


def _flat(batches: Sequence[Batch]) -> Tensor:
    """[tokens, hidden] of all batches."""
    return torch.cat([batch.hidden.flatten(0, 1) for batch in batches])
