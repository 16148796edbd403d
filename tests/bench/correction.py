"""What `calibration.propagation: groups` and `calibration.correction` do to a real model, by the
product's own pipeline.

    python tests/bench/correction.py MODEL [--data ../shared/data] [--samples 16] [--length 512]
                                           [--windows 12] [--rows original groups 0.25 0.5 1]

Calibrated on C4, scored on windows that are spread over WikiText-2's test split: the increase of
perplexity, KL(p16 || p) a token, and that less the first row's, window by window, with its standard
error. Seconds are of the CPU, quantization alone.
"""

import argparse
import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods_score import reference, score_windows
from torch import Tensor

from dpq_core.checkpoint.native import load_model, load_quantized
from dpq_core.data.texts import calibration_windows, opening_token, token_windows
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme
from tasks.support.model import load_tokenizer

CALIBRATION = "c4_sample/c4_train_00000_first.jsonl.gz"
SCORED = "wikitext2_raw_test/test.jsonl.gz"
_SCORED_LENGTH = 512


def texts_of(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def section_of(name: str, samples: int, length: int) -> CalibrationSection:
    """A row: `original`, `quantized`, `groups`, or a correction."""
    changes = {"propagation": name}
    if name[0].isdigit():
        changes = {"propagation": "groups", "correction": name}
    sizes = {"samples": samples, "sequence_length": length, "batch_size": 4}
    return CalibrationSection.model_validate(
        {"dataset": TextDataset(path="none").model_dump(), **sizes, **changes}
    )


def scored_windows(
    texts: list[str],
    tokenizer: Any,
    opening: int | None,
    count: int,
    length: int = _SCORED_LENGTH,
) -> Tensor:
    """[count, length] int64, spread over the texts."""
    windows = token_windows(texts, tokenizer, length, opening=opening)
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--rows", nargs="+", default=["original", "groups", "0.5"])
    arguments = parser.parse_args()
    folder, tokenizer = arguments.model, load_tokenizer(arguments.model)
    opening = opening_token(tokenizer, "auto")
    texts = list(texts_of(arguments.data / CALIBRATION))
    sizes = arguments.samples, arguments.length
    calibrated = calibration_windows(texts, tokenizer, *sizes, opening)
    texts = list(texts_of(arguments.data / SCORED))
    scored = scored_windows(texts, tokenizer, opening, arguments.windows)
    leading = 1 if opening is None else 2
    model = load_model(folder)
    old = reference(model, scored, 4)
    base = score_windows(model, scored, old, leading, 4)
    del model
    print(f"16 bits: {base.perplexity:.4f}; load {os.getloadavg()[0]:.1f}", flush=True)
    print("| row | increase | KL | less the first's | layer error | corrected | CPU s |")
    first: np.ndarray | None = None
    for name in arguments.rows:
        with tempfile.TemporaryDirectory() as work:
            before = sum(os.times()[:2])
            section = section_of(name, *sizes)
            out = Path(work, "out")
            rows = quantize_checkpoint(folder, out, calibrated, Scheme(), section, {})["layers"]
            seconds = sum(os.times()[:2]) - before
            found = score_windows(load_quantized(out), scored, old, leading, 4)
        divergence = np.array(found.divergence)
        first = divergence if first is None else first
        difference = divergence - first
        error = difference.std(ddof=1) / len(difference) ** 0.5
        means = [
            float(np.mean([row.get(key, 0) for row in rows])) for key in ("error", "corrected")
        ]
        print(
            f"| {name} | {found.perplexity - base.perplexity:+.3f} | {divergence.mean():.4f} |"
            f" {difference.mean():+.4f} ± {error:.4f} | {means[0]:.5f} | {means[1]:.5f} |"
            f" {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
