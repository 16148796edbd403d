"""What single layers cost a model, over all pieces of its vocabulary and over some of them.

    PYTHONPATH=tests python tests/bench/sampled_losses.py MODEL [--block 12] [--samples 2]
        [--data ../shared/data] [--sizes 2048 4096 8192]

Layers of one block, rounded to nearest in 4 and 8 bits, on windows of 512 tokens of C4. How far the
sampled losses are from the exact ones, relative, over trials and two samples; CPU seconds of the
head alone: all trials, and what choosing the sample takes.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from in_16_bits import C4, texts_of
from torch import Tensor

from dpq_core.data.texts import calibration_windows, opening_token
from dpq_core.evaluation.divergence import divergences
from dpq_core.evaluation.head import Sample, head_tiles
from dpq_core.evaluation.sampled_pieces import sample_pieces
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.quantize import quantize_layer
from dpq_core.layer.records import QuantizedLinear
from dpq_core.model.inputs import batches_of
from dpq_core.model.plan import plan_layers
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe.layer_choices import chosen_scheme
from dpq_core.recipe.scheme import Scheme
from dpq_core.repair.sensitivity import Trial, last_states
from tasks.support.model import load_tokenizer

CHOICES = ("w4a8", "w8a8", "w8a16")
ROUNDED = Scheme(method="rtn", order="none", rounding="nearest", activations="dynamic")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192])
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    texts, opening = list(texts_of(arguments.data / C4)), opening_token(tokenizer, "auto")
    windows = calibration_windows(texts, tokenizer, arguments.samples, 512, opening)
    stream = StreamedModel(arguments.model, dtype=torch.float32)
    batches = stream.begin(batches_of(windows, 4))
    for block in range(arguments.block):
        with stream.block(block):
            stream.advance(batches)
    tried = trials(stream, arguments.block)
    reference, *others = last_states(stream, arguments.block, batches, tried).values()
    before = now()
    exact = losses(stream, reference, others)
    print(f"all pieces: {now() - before:.1f} s for {len(others)} trials")
    print("| pieces | mean | rms | furthest | choosing, s | trials, s |\n|--:|--:|--:|--:|--:|--:|")
    for size in arguments.sizes:
        apart, seconds = [], np.zeros(2)
        for seed in range(2):
            moments = [now()]
            sample = sample_pieces(stream, reference, size, seed)
            moments.append(now())
            apart.append(losses(stream, reference, others, sample) / exact - 1)
            seconds += np.diff([*moments, now()]) / 2
        each = np.stack(apart)
        cells = f"{each.mean():+.4f} | {np.square(each).mean() ** 0.5:.4f} | {abs(each).max():.4f}"
        print(f"| {size} | {cells} | {seconds[0]:.1f} | {seconds[1]:.1f} |", flush=True)


def trials(stream: StreamedModel, index: int) -> dict[Trial, Callable[[], QuantizedLinear]]:
    found = {}
    for planned in plan_layers(stream, ROUNDED).of_block(index):
        weight = stream.reader.tensor(f"{planned.name}.weight")
        even = InputStatistics.even(weight.shape[1])
        for choice in CHOICES:
            rounded = partial(quantize_layer, weight, even, chosen_scheme(ROUNDED, choice))
            found[Trial(planned.name, choice)] = rounded
    return found


def losses(
    stream: StreamedModel, reference: Tensor, others: list[Tensor], sample: Sample | None = None
) -> np.ndarray:
    """Nats a token of each trial."""
    with head_tiles(stream, sample=sample) as tiles:
        found = divergences(tiles, reference, [(tiles, each) for each in others])
    return np.array([each.nats.mean() for each in found])


def now() -> float:
    return sum(os.times()[:2])


if __name__ == "__main__":
    main()
