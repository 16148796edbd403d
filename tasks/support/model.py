"""Find the model, check it, and name it by its content."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dpq_core.checkpoint.native import MANIFEST, check_checkpoint
from dpq_core.digests import digest, identity
from dpq_core.errors import first_line
from dpq_core.model.families import family_of
from dpq_core.model.layout import ADAPTER
from dpq_core.model.proof import prove
from dpq_core.model.reader import SIDE_FILES, CheckpointError, CheckpointReader, model_type_of
from dpq_core.model.source import check_source, check_values
from dpq_core.model.streaming import StreamedModel, empty_model
from dpq_core.paths import is_folder
from dpq_core.recipe import ModelSection, Recipe
from infra import remote
from infra.store import Store
from tasks.support.stages import computed_by


@dataclass(frozen=True)
class Model:
    """A checkpoint on this machine. digest: of its weights, configuration and tokenizer. revision:
    the hub's commit, None for a folder."""

    id: str
    folder: Path
    digest: str
    revision: str | None = None


def stream_of(
    recipe: Recipe,
    model: Model,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> StreamedModel:
    """A model, to be run block by block on what the recipe calibrates with, in its own type or in
    `dtype`."""
    images = recipe.calibration.image_column is not None
    return StreamedModel(model.folder, device, images, recipe.model.trust_remote_code, dtype)


def resolve(model: ModelSection) -> tuple[Path, str | None]:
    """The checkpoint's folder and the hub's commit; a hub id is downloaded (or found in the hub's
    cache). Pickled weights are not even downloaded, and code only where it is trusted.

    Raises:
        CheckpointError: neither a folder nor a model that the hub gives, or one without
            safetensors.
    """
    if is_folder(model.id):
        if model.revision is not None:
            raise CheckpointError(
                f"model.revision: {model.id} is a folder, which has no revisions: leave it out"
            )
        return Path(model.id).resolve(), None
    if model.id.startswith((".", "/", "~")) or model.id.count("/") > 1:
        raise CheckpointError(f"model.id: folder {model.id} does not exist")
    from huggingface_hub import snapshot_download  # imported late: slow, and seldom needed

    code = ["*.py"] if model.trust_remote_code else []
    try:
        folder = Path(
            snapshot_download(
                model.id,
                revision=model.revision,
                allow_patterns=[
                    "*.safetensors",
                    "*.safetensors.index.json",
                    "README.md",
                    ADAPTER,
                    *SIDE_FILES,
                    *code,
                ],
                ignore_patterns=["*/*", "consolidated*"],  # the same weights in other layouts
            )
        )
    except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these
        raise CheckpointError(
            f"model.id: {model.id} is no folder, and the hub does not give it: {first_line(error)}"
        ) from error
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"model.id: {model.id} has no safetensors on the hub, and pickled weights are not "
            "loaded: convert them (save_pretrained does), and give the folder"
        )
    return folder, folder.name  # <cache>/snapshots/<commit>


def fetch(model: ModelSection, store: Store) -> tuple[Path, str | None]:
    """`resolve`, or a copy of a model on S3 in the store: made once for as long as no object there
    changes, and continued where an earlier run was interrupted.

    Raises:
        CheckpointError: as above.
        RemoteError: the address gives nothing, or not what was put there.
    """
    if not remote.is_remote(model.id):
        return resolve(model)
    if model.revision is not None:
        raise CheckpointError(
            f"model.revision: {model.id} is a bucket, which has no revisions: leave it out"
        )
    objects = {
        name: identity
        for name, identity in remote.listing(model.id).items()
        if name.endswith((".safetensors", ".safetensors.index.json"))
        or name in ("README.md", ADAPTER, MANIFEST, *SIDE_FILES)
        or (model.trust_remote_code and name.endswith(".py"))
    }
    if not any(name.endswith(".safetensors") for name in objects):
        raise CheckpointError(f"model.id: {model.id} has no safetensors")
    key = digest([model.id, objects])

    def make(folder: Path) -> None:
        partial = store.root / "downloads" / key
        remote.download(model.id, objects, partial)
        shutil.copytree(partial, folder, dirs_exist_ok=True, copy_function=shutil.move)
        shutil.rmtree(partial)

    artifact, _ = store.get_or_make("sources", key, make)
    return store.open(artifact), None


def inspect(model: ModelSection, store: Store, keeps: bool = False) -> Model:
    """Find a model to quantize: its architecture is proven, and every tensor is checked.

    keeps: its 4-bit codes are to be kept, see `dpq_core.model.source`.

    Raises:
        ArchitectureError: one that is not quantized, with the module in the way.
        CheckpointError: unreadable, damaged, or not finite, with the file or tensor.
    """
    folder, revision = fetch(model, store)
    # At each run: what was only measured so far has the same digest, and need be neither.
    check_source(folder, model.trust_remote_code, keeps)
    prove(empty_model(folder, model.trust_remote_code))

    def check() -> None:
        check_values(folder, model.trust_remote_code)

    return Model(model.id, folder, content_digest(folder, store, check), revision)


def inspect_any(checkpoint: str, store: Store, trust_remote_code: bool = False) -> Model:
    """Find a checkpoint to measure: 16 bits, native, or a third party's.

    Raises:
        CheckpointError: as above.
    """
    section = ModelSection(id=checkpoint, trust_remote_code=trust_remote_code)
    folder, revision = fetch(section, store)

    def check() -> None:
        check_checkpoint(folder, trust_remote_code)

    return Model(checkpoint, folder, content_digest(folder, store, check), revision)


def content_digest(folder: Path, store: Store, check: Callable[[], None] = lambda: None) -> str:
    """Digest of a checkpoint's weights, configuration and tokenizer. The files are checked and
    read once for as long as they do not change: `dpq_core.digests.identity`."""
    reader = CheckpointReader(folder)
    files = {str(path.resolve()): path for path in reader.files}
    key = digest(
        {
            **computed_by("model"),
            "files": {name: identity(path) for name, path in files.items()},
        }
    )

    def make(destination: Path) -> None:
        check()
        (destination / "model.json").write_text(json.dumps({"digest": reader.digest()}))

    artifact, _ = store.get_or_make("model", key, make)
    found: str = json.loads((store.open(artifact) / "model.json").read_text())["digest"]
    return found


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """A checkpoint's tokenizer; it opens every text where the model's family was trained so.

    Raises:
        CheckpointError: missing or unusable.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of transformers, tokenizers, and the packages that they want
        raise CheckpointError(f"{folder}: no usable tokenizer: {_why(folder, error)}") from error
    if family_of(model_type_of(folder)).opened:
        tokenizer.add_bos_token = True
    return tokenizer


_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def _why(folder: Path, error: Exception) -> str:
    """Why a tokenizer cannot be loaded, in words of ours where theirs lead astray."""
    said = next(iter(str(error).strip().splitlines()), "")
    has = [name for name in _SENTENCEPIECE if (folder / name).is_file()]
    if has and not (folder / "tokenizer.json").is_file() and not find_spec("sentencepiece"):
        # transformers takes the file for tiktoken's then.
        return (
            f"{has[0]} is SentencePiece's, and the package sentencepiece is not installed: install"
            " it, or save the tokenizer as tokenizer.json where it is"
        )
    if isinstance(error, ImportError):
        return f"a package is missing ({said}): install it, or save the tokenizer as tokenizer.json"
    if isinstance(error, OSError | ValueError):
        return said or type(error).__name__
    return f"its files are not as transformers reads them ({type(error).__name__}: {said})"
