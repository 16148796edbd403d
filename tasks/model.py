"""Find the model, check it, and name it by its content."""

import json
from dataclasses import dataclass
from pathlib import Path

from dpq_core.digests import code_digest, digest
from dpq_core.reader import SIDE_FILES, CheckpointError, CheckpointReader
from dpq_core.recipe import ModelSection
from dpq_core.streaming import check_tensors
from infra.store import Store


@dataclass(frozen=True)
class Model:
    """A base checkpoint on this machine. digest: of its weights, configuration and tokenizer."""

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
    """Check every tensor and take the digest: once for files that have not changed since.

    Raises:
        CheckpointError: unreadable, damaged, or not finite, with the file or tensor.
    """
    folder = resolve(model)
    reader = CheckpointReader(folder)
    stats = {str(path.resolve()): path.stat() for path in reader.files}
    key = digest(
        {
            "code": code_digest("dpq_core.streaming"),
            "files": {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()},
        }
    )

    def make(destination: Path) -> None:
        check_tensors(folder)
        reader.check_finite()
        (destination / "model.json").write_text(json.dumps({"digest": reader.digest()}))

    artifact, _ = store.get_or_make("model", key, make)
    return Model(
        model.id, folder, json.loads((store.open(artifact) / "model.json").read_text())["digest"]
    )
