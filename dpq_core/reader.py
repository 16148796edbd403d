"""Read a safetensors checkpoint tensor by tensor, sharded or not.

Nothing is loaded before it is asked for: memory is bounded by what the caller keeps. Tensors go by
the names of the model's parameters, whatever the files call them (`families.Family.renames`).
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpq_core.digests import digest, file_digest
from dpq_core.errors import InputError
from dpq_core.families import family_of

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_AHEAD = 1 << 20  # bytes that are asked for at a time: Linux cuts a larger wish short
# What identifies a model besides its weights, and what a release carries over.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",  # of old GPTQ files
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


class CheckpointError(InputError):
    """A checkpoint that cannot be used, with one line that says which file or tensor and why."""


class CheckpointReader:
    """Tensors of a checkpoint folder by name.

    Raises:
        CheckpointError: no safetensors, a shard missing or damaged, or an index that lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = self._read_index() if (folder / _INDEX).is_file() else None
        stored = {name: shard for shard in self._shards() for name in self._names_in(shard)}
        self._check_index(stored)
        family = family_of(model_type_of(folder))
        self._stored = {family.module_name(name): name for name in stored}
        if len(self._stored) != len(stored):
            raise CheckpointError(f"{folder}: two tensors are the same parameter of the model")
        self._shard_of = {name: stored[as_stored] for name, as_stored in self._stored.items()}

    @property
    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self._shard_of)

    @property
    def files(self) -> list[Path]:
        """Shards and side files, sorted by name."""
        shards = {self.folder / shard for shard in self._shard_of.values()}
        return sorted(shards | set(side_files(self.folder)))

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors; each shard is opened once and unmapped before this returns."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            if name not in self._shard_of:
                raise CheckpointError(f"{self.folder}: tensor {name} is missing")
            wanted.setdefault(self._shard_of[name], []).append(name)
        loaded: dict[str, Tensor] = {}
        for shard, members in wanted.items():
            with safe_open(self.folder / shard, framework="pt") as file:
                for name in members:
                    loaded[name] = file.get_tensor(self._stored[name]).clone()
        return loaded

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the kernel read tensors from the disk in the background: into its page cache, where
        `tensors` finds them, and into no memory of this process. Without effect where a system
        does not offer that."""
        if not hasattr(os, "posix_fadvise"):
            return
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self._shard_of[name], []).append(self._stored[name])
        for shard, members in wanted.items():
            with (self.folder / shard).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for name in members:
                    first, last = (8 + length + offset for offset in header[name]["data_offsets"])
                    for start in range(first, last, _AHEAD):
                        piece = file.fileno(), start, min(_AHEAD, last - start)
                        os.posix_fadvise(*piece, os.POSIX_FADV_WILLNEED)

    def shape_and_type(self, name: str) -> tuple[list[int], str]:
        """Shape and safetensors type (`BF16`, `I32`, …), from the header alone."""
        with safe_open(self.folder / self._shard_of[name], framework="pt") as file:
            part = file.get_slice(self._stored[name])
            return list(part.get_shape()), str(part.get_dtype())

    def under(self, prefix: str) -> list[str]:
        """Names of the tensors below a module path."""
        return [name for name in self.names if name.startswith(f"{prefix}.")]

    def digest(self) -> str:
        """Identity of the model: SHA-256 over its files' names and bytes."""
        return digest({file.name: file_digest(file) for file in self.files})

    def check_finite(self) -> None:
        """Read every tensor once.

        Raises:
            CheckpointError: a NaN or an infinity, with the tensor's name.
        """
        for name in self.names:
            tensor = self.tensor(name)
            if tensor.itemsize == 1 and tensor.is_floating_point():
                tensor = tensor.float()  # torch tells of no 8-bit type whether it is finite
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                kind = "NaN" if torch.isnan(tensor).any() else "an infinite value"
                raise CheckpointError(
                    f"{self.folder / self._shard_of[name]}: tensor {name} has {kind}"
                )

    def _shards(self) -> list[str]:
        if self._index is not None:
            return sorted(set(self._index.values()))
        if (self.folder / _SINGLE).is_file():
            return [_SINGLE]
        if list(self.folder.glob("*.bin")) or list(self.folder.glob("*.pt*")):
            raise CheckpointError(
                f"{self.folder}: only pickled weights, which are not loaded: convert them to "
                "safetensors (save_pretrained does)"
            )
        raise CheckpointError(f"{self.folder}: no {_SINGLE} and no {_INDEX}")

    def _read_index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
            raise CheckpointError(f"{path}: no valid weight_map")
        escaping = [shard for shard in index.values() if Path(shard).name != shard]
        if escaping:
            raise CheckpointError(f"{path}: {escaping[0]} is not a plain file name")
        return index

    def _names_in(self, shard: str) -> list[str]:
        path = self.folder / shard
        if not path.is_file():
            raise CheckpointError(f"{path}: shard is missing")
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or damaged ({error})") from error

    def _check_index(self, stored: dict[str, str]) -> None:
        for name, shard in (self._index or {}).items():
            if stored.get(name) != shard:
                raise CheckpointError(f"{self.folder / shard}: tensor {name} is missing")


def side_files(folder: Path) -> list[Path]:
    """The files beside the weights that belong to the model: its own code too, where `config.json`
    names any (which runs only where `trust_remote_code` is given)."""
    named = [folder / name for name in SIDE_FILES if (folder / name).is_file()]
    has_config = (folder / "config.json").is_file()
    code = folder.glob("*.py") if has_config and "auto_map" in read_config(folder) else ()
    return named + sorted(code)


def model_type_of(folder: Path) -> str:
    """transformers' name of the architecture; empty where there is no `config.json`."""
    if not (folder / "config.json").is_file():
        return ""
    return str(read_config(folder).get("model_type"))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint.

    Raises:
        CheckpointError: missing, or no JSON object.
    """
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: missing, not UTF-8, not JSON, or no object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a JSON object")
    return content
