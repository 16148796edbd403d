"""Write tensors into safetensors shards one by one, and check files against their digests.

Memory is bounded by a shard. Every tensor's SHA-256 is kept beside its shape and type, so that a
damaged file can be blamed on a tensor.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpq_core.digests import file_digest, write_json
from dpq_core.model.reader import CheckpointError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """What a manifest says of a tensor. dtype: torch's name. sha256: of its bytes, row by row."""

    shape: list[int]
    dtype: str
    sha256: str

    @classmethod
    def of(cls, tensor: Tensor) -> "StoredTensor":
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        sha256 = hashlib.sha256(flat.numpy().data).hexdigest()
        return cls(list(tensor.shape), str(tensor.dtype).removeprefix("torch."), sha256)


class ShardWriter:
    """Collects tensors into shards of at most `shard_bytes`, and writes the index at the end.

    A tensor larger than that has a shard of its own. `written` holds what was added, by name.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.written: dict[str, StoredTensor] = {}
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self.written[name] = StoredTensor.of(tensor)
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def close(self) -> None:
        self._flush()
        total = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            final = f"model-{number:05}-of-{total:05}.safetensors"
            self._part(number).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
        write_json(self._folder / INDEX, index, indent=1)

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"shard-{number:05}.part"


def digests_of(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file in a folder, for its manifest."""
    return {
        path.name: {"sha256": file_digest(path), "size": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }


def check_files(
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, StoredTensor] | None = None,
) -> None:
    """Compare a folder with its manifest's `files`; `tensors` tells which tensor a change is in.

    Raises:
        CheckpointError: a file that is missing or changed, or safetensors that nobody declared.
    """
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: file is missing")
        if path.stat().st_size != entry["size"] or file_digest(path) != entry["sha256"]:
            changed = _changed_tensors(path, tensors or {})
            blame = f" (tensor {changed[0]})" if changed else ""
            raise CheckpointError(f"{path}: content differs from the manifest's digest{blame}")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in files:
            raise CheckpointError(f"{path}: the manifest knows no such file")


def _changed_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Tensors of a changed shard that are not what they were; none where it cannot be read."""
    if path.suffix != ".safetensors":
        return []
    try:
        with safe_open(path, framework="pt") as file:
            return [
                name
                for name in file.keys()  # noqa: SIM118 (no mapping)
                if name in tensors and StoredTensor.of(file.get_tensor(name)) != tensors[name]
            ]
    except SafetensorError:
        return []
