"""Read a safetensors checkpoint tensor by tensor, sharded or not.

Nothing is loaded before it is asked for: memory is bounded by what the caller keeps.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpq_core.digests import digest, file_digest
from dpq_core.errors import InputError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
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
        self._shard_of = {name: shard for shard in self._shards() for name in self._names_in(shard)}
        self._check_index()

    @property
    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self._shard_of)

    @property
    def files(self) -> list[Path]:
        """Shards and side files, sorted by name."""
        shards = {self.folder / shard for shard in self._shard_of.values()}
        sides = {self.folder / name for name in SIDE_FILES if (self.folder / name).is_file()}
        return sorted(shards | sides)

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
                loaded.update({name: file.get_tensor(name).clone() for name in members})
        return loaded

    def shape_and_type(self, name: str) -> tuple[list[int], str]:
        """Shape and safetensors type (`BF16`, `I32`, …), from the header alone."""
        with safe_open(self.folder / self._shard_of[name], framework="pt") as file:
            part = file.get_slice(name)
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

    def _check_index(self) -> None:
        for name, shard in (self._index or {}).items():
            if self._shard_of.get(name) != shard:
                raise CheckpointError(f"{self.folder / shard}: tensor {name} is missing")


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
