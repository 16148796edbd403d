"""Token windows of a data set, as an artifact named by their content."""

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dpq_core.data import calibration_windows, load_texts, token_windows
from dpq_core.recipe import CalibrationSection, PerplexitySection
from infra.store import ArtifactRef, Store

_FILE = "windows.safetensors"


def store_calibration(section: CalibrationSection, tokenizer: Any, store: Store) -> ArtifactRef:
    """Windows for calibration.

    Raises:
        DataError: the data set cannot be read or gives no window.
    """
    texts = load_texts(section.dataset)
    windows = calibration_windows(texts, tokenizer, section.samples, section.sequence_length)
    return _store(windows, store)


def store_perplexity(section: PerplexitySection, tokenizer: Any, store: Store) -> ArtifactRef:
    """Windows for perplexity. Raises DataError as above."""
    texts = load_texts(section.dataset)
    return _store(token_windows(texts, tokenizer, section.sequence_length), store)


def load(artifact: ArtifactRef, store: Store) -> Tensor:
    """[windows, length] int64."""
    windows: Tensor = load_file(store.open(artifact) / _FILE)["windows"]
    return windows


def _store(windows: Tensor, store: Store) -> ArtifactRef:
    key = hashlib.sha256(f"{list(windows.shape)}".encode() + windows.numpy().tobytes()).hexdigest()

    def make(folder: Path) -> None:
        save_file({"windows": windows}, folder / _FILE)

    return store.get_or_make("windows", key, make)[0]
