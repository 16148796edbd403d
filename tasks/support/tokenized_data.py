"""What a model reads of a data set, as an artifact named by its content: windows of tokens, or
windows of images and texts."""

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpq_core.data.images import image_windows
from dpq_core.data.texts import (
    document_windows,
    interleaved,
    load_texts,
    opening_token,
    set_aside,
    token_windows,
)
from dpq_core.model.inputs import ModelInputs, Purpose, apart, batches_of, marked
from dpq_core.recipe import CalibrationSection, PerplexitySection, TextDataset
from infra.store import ArtifactRef, Store

_FILE = "windows.safetensors"


def store_calibration(
    section: CalibrationSection, tokenizer: Any, folder: Path, store: Store
) -> ArtifactRef:
    """Windows for calibration, with images where the recipe names them.

    Args:
        folder: of the checkpoint, whose image processor it is.

    Raises:
        DataError: the data set cannot be read or gives no window.
        CheckpointError: no usable image processor.
    """
    if section.image_column is not None:
        found = image_windows(section, tokenizer, folder)
        numbered = set_aside(torch.arange(len(found)), section.samples, section.unseen)
        return _store(
            {
                f"{'unseen.' * aside}{number}.{name}": x
                for aside, numbers in enumerate(numbered)
                for number in numbers.tolist()
                for name, x in found[number].items()
            },
            store,
        )
    opening = opening_token(tokenizer, section.bos)

    def windows(dataset: TextDataset, samples: int, unseen: int = 0) -> tuple[Tensor, Tensor]:
        texts = load_texts(dataset, tokenizer)
        every = document_windows(texts, tokenizer, section.sequence_length, opening)
        return set_aside(every, samples, unseen)

    first, *mixed = section.windows_of
    seen, unseen = windows(*first, section.unseen)
    others = [windows(*each)[0] for each in mixed]
    tensors = {"windows": interleaved([seen, *others])}
    if len(unseen):
        tensors["unseen"] = unseen
    if own := section.activations:
        tensors["scales"], _ = windows(own.dataset, own.samples)
    if opening is not None:
        tensors["opening"] = torch.tensor([opening])
    return _store(tensors, store)


def opening_of(artifact: ArtifactRef, store: Store) -> int | None:
    """The token that every calibration window begins with; None: none was put there."""
    found = load_file(store.open(artifact) / _FILE).get("opening")
    return None if found is None else int(found)


def store_perplexity(section: PerplexitySection, tokenizer: Any, store: Store) -> ArtifactRef:
    """Windows for perplexity. Raises DataError as above."""
    texts = load_texts(section.dataset, tokenizer)
    opening = opening_token(tokenizer, section.bos)
    windows = token_windows(texts, tokenizer, section.sequence_length, opening=opening)
    return _store({"windows": windows}, store)


def load(artifact: ArtifactRef, store: Store) -> Tensor:
    """[windows, length] int64."""
    windows: Tensor = load_file(store.open(artifact) / _FILE)["windows"]
    return windows


def load_inputs(
    artifact: ArtifactRef,
    store: Store,
    batch_size: int,
    samples: int | None = None,
    length: int | None = None,
) -> list[ModelInputs]:
    """Calibration windows as a model is called with them, `batch_size` at a time, those with images
    one by one.

    Args:
        samples: only the first, of those for Hessians. length: only the first tokens of each, where
            there are no images.
    """
    tensors = load_file(store.open(artifact) / _FILE)
    if "windows" in tensors and samples is not None:
        return batches_of(tensors["windows"][:samples, :length], batch_size)
    if "windows" in tensors:
        first: Purpose = "hessians" if "scales" in tensors else "both"
        names: dict[Purpose, str] = {first: "windows", "scales": "scales", "unseen": "unseen"}
        there = {purpose: name for purpose, name in names.items() if name in tensors}
        return apart({p: tensors[name][:, :length] for p, name in there.items()}, batch_size)
    inputs: dict[tuple[bool, int], ModelInputs] = {}
    for key, tensor in tensors.items():
        *aside, number, name = key.split(".")
        inputs.setdefault((bool(aside), int(number)), {})[name] = tensor
    return [marked(inputs[key], "unseen" if key[0] else "both") for key in sorted(inputs)][:samples]


def count_tokens(artifact: ArtifactRef, store: Store) -> int:
    """The tokens of all calibration windows for Hessians, those of images included."""
    with safe_open(store.open(artifact) / _FILE, "pt") as file:
        names = file.keys()
        ids = [name for name in names if name == "windows" or _IDS_OF_IMAGES.fullmatch(name)]
        return sum(math.prod(file.get_slice(name).get_shape()) for name in ids)


_IDS_OF_IMAGES = re.compile(r"\d+\.input_ids")


def scale_tokens(artifact: ArtifactRef, store: Store) -> int | None:
    """The tokens of windows that are for scales alone; None: there are none such."""
    found = load_file(store.open(artifact) / _FILE).get("scales")
    return None if found is None else found.numel()


def _store(tensors: dict[str, Tensor], store: Store) -> ArtifactRef:
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(f"{name} {list(tensors[name].shape)}".encode())
        content.update(tensors[name].contiguous().numpy().tobytes())

    def make(folder: Path) -> None:
        save_file(tensors, folder / _FILE)

    return store.get_or_make("windows", content.hexdigest(), make)[0]
