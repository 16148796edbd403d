"""What benches measure checkpoints against: a model in 16 bits on windows of WikiText-2's test
split, and the first row of a table. Calibration windows are of C4; all begin as the model is run.
"""

import argparse
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods_score import WindowScores, reference, score_windows
from torch import Tensor

from dpq_core.checkpoint.native import load_model
from dpq_core.data.texts import calibration_windows, opening_token, token_windows
from tasks.support.model import load_tokenizer

C4 = "c4_sample/c4_train_00000_first.jsonl.gz"
WIKITEXT = "wikitext2_raw_test/test.jsonl.gz"
SCORED_LENGTH = 512


def parser_of(doc: str | None, samples: int, windows: int) -> argparse.ArgumentParser:
    """What all such benches are told, with these many windows unless they are told of others."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--samples", type=int, default=samples, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens of each of them")
    parser.add_argument("--windows", type=int, default=windows, help="scored ones")
    return parser


def texts_of(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def scored_windows(
    texts: list[str],
    tokenizer: Any,
    opening: int | None,
    count: int,
    length: int = SCORED_LENGTH,
) -> Tensor:
    """[count, length] int64, spread over the texts."""
    windows = token_windows(texts, tokenizer, length, opening=opening)
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


class In16Bits:
    """A model's folder, its scored windows, and what it says of them. Says its perplexity."""

    def __init__(
        self, folder: Path, data: Path, windows: int, batch: int, length: int = SCORED_LENGTH
    ) -> None:
        self.folder, self.tokenizer = folder, load_tokenizer(folder)
        self._data, self._batch = data, batch
        self._opening = opening_token(self.tokenizer, "auto")
        texts = list(texts_of(data / WIKITEXT))
        self._scored = scored_windows(texts, self.tokenizer, self._opening, windows, length)
        model = load_model(folder)
        self._reference = reference(model, self._scored, batch)
        self.scores = self.scored(model)
        print(f"16 bits: {self.scores.perplexity:.4f}; load {os.getloadavg()[0]:.1f}", flush=True)

    def scored(self, model: Any) -> WindowScores:
        leading = 1 if self._opening is None else 2
        return score_windows(model, self._scored, self._reference, leading, self._batch)

    def calibrated(self, samples: int, length: int) -> Tensor:
        """[samples, length] int64."""
        texts = list(texts_of(self._data / C4))
        return calibration_windows(texts, self.tokenizer, samples, length, self._opening)


class Differences:
    """Of divergences, window by window, to those that were given first."""

    def __init__(self, first: np.ndarray | None = None) -> None:
        self._first = first

    def of(self, found: WindowScores) -> np.ndarray:
        divergence = np.array(found.divergence)
        if self._first is None:
            self._first = divergence
        return divergence - self._first


def with_error(values: np.ndarray, spec: str) -> str:
    """The mean over windows and its standard error: `-0.0084 ± 0.0049`."""
    digits = spec.lstrip("+")
    return f"{values.mean():{spec}} ± {values.std(ddof=1) / len(values) ** 0.5:{digits}}"
