"""Find the model, check it, and name it by its content."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dpq_core.checkpoint import check_checkpoint
from dpq_core.digests import code_digest, digest
from dpq_core.reader import SIDE_FILES, CheckpointError, CheckpointReader
from dpq_core.recipe import ModelSection
from dpq_core.streaming import check_tensors
from infra.store import Store


@dataclass(frozen=True)
class Model:
    """A checkpoint on this machine. digest: of its weights, configuration and tokenizer."""

    id: str
    folder: Path
    digest: str


def resolve(model: ModelSection) -> Path:
    """The checkpoint's folder; a hub id is downloaded (or found in the hub's cache).

    Raises:
        CheckpointError: neither a folder nor a model that the hub gives.
    """
    if Path(model.id).is_dir():
        return Path(model.id).resolve()
    if model.id.startswith((".", "/", "~")) or model.id.count("/") > 1:
        raise CheckpointError(f"model.id: folder {model.id} does not exist")
    from huggingface_hub import snapshot_download  # imported late: slow, and seldom needed

    try:
        folder = snapshot_download(
            model.id, revision=model.revision, allow_patterns=["*.safetensors*", *SIDE_FILES]
        )
    except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"model.id: {model.id} is no folder, and the hub does not give it: {first_line}"
        ) from error
    return Path(folder)


def inspect(model: ModelSection, store: Store) -> Model:
    """Find a model to quantize: every tensor is checked.

    Raises:
        CheckpointError: unreadable, damaged, or not finite, with the file or tensor.
    """
    folder = resolve(model)

    def check() -> None:
        check_tensors(folder)
        CheckpointReader(folder).check_finite()

    return Model(model.id, folder, content_digest(folder, store, check))


def inspect_any(checkpoint: str, store: Store) -> Model:
    """Find a checkpoint to measure: 16 bits, native, or a third party's.

    Raises:
        CheckpointError: as above.
    """
    folder = resolve(ModelSection(id=checkpoint))
    return Model(
        checkpoint, folder, content_digest(folder, store, lambda: check_checkpoint(folder))
    )


def content_digest(folder: Path, store: Store, check: Callable[[], None] = lambda: None) -> str:
    """Digest of a checkpoint's weights, configuration and tokenizer. The files are checked and
    read once for as long as they do not change."""
    reader = CheckpointReader(folder)
    stats = {str(path.resolve()): path.stat() for path in reader.files}
    key = digest(
        {
            "code": code_digest("dpq_core.checkpoint"),
            "files": {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()},
        }
    )

    def make(destination: Path) -> None:
        check()
        (destination / "model.json").write_text(json.dumps({"digest": reader.digest()}))

    artifact, _ = store.get_or_make("model", key, make)
    found: str = json.loads((store.open(artifact) / "model.json").read_text())["digest"]
    return found


def load_tokenizer(folder: Path) -> Any:
    """A checkpoint's tokenizer.

    Raises:
        CheckpointError: missing or unusable.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: no usable tokenizer: {first_line}") from error
