"""Read a safetensors checkpoint tensor by tensor, sharded or not.

Nothing is loaded before it is asked for: memory is bounded by what the caller keeps. Tensors go by
the names of the model's parameters, whatever the files call them (`families.Family.renames`). FP8
weights with scales are given in 16 bits (`dpq_core.model.fp8`): their scales are no tensors here.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dpq_core.digests import digest, file_digest
from dpq_core.errors import CheckpointError as CheckpointError
from dpq_core.model.families import family_of
from dpq_core.model.fp8 import Fp8Weights
from dpq_core.model.json_files import read_config as read_config
from dpq_core.model.json_files import read_json as read_json
from dpq_core.model.layout import headers_of

_AHEAD = 1 << 20  # bytes that are asked for at a time: Linux cuts a larger wish short
# What identifies a model besides its weights, and what a release carries over.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",  # of old GPTQ files
    "hf_quant_config.json",  # of ModelOpt's
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


class CheckpointReader:
    """Tensors of a checkpoint folder by name.

    Args:
        as_stored: FP8 and its scales too, to look at the files themselves.

    Raises:
        CheckpointError: no safetensors, a shard missing or damaged, or an index that lies.
    """

    def __init__(self, folder: Path, as_stored: bool = False) -> None:
        self.folder = folder
        stored = headers_of(folder)
        family = family_of(model_type_of(folder))
        self._stored = {family.module_name(name): name for name in stored}
        if len(self._stored) != len(stored):
            raise CheckpointError(f"{folder}: two tensors are the same parameter of the model")
        self._headers = {name: stored[as_stored] for name, as_stored in self._stored.items()}
        self._fp8 = Fp8Weights() if as_stored else Fp8Weights.of(folder, self._headers)
        self._names = sorted(self._headers.keys() - self._fp8.hidden)

    @property
    def names(self) -> list[str]:
        """All tensors, sorted."""
        return list(self._names)

    @property
    def files(self) -> list[Path]:
        """Shards and side files, sorted by name."""
        shards = {self.folder / header.shard for header in self._headers.values()}
        return sorted(shards | set(side_files(self.folder)))

    @property
    def widens(self) -> bool:
        """Whether weights are stored in fewer than 16 bits."""
        return bool(self._fp8.scales)

    def __contains__(self, name: str) -> bool:
        return name in self._headers and name not in self._fp8.hidden

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors; each shard is opened once and unmapped before this returns."""
        wanted = list(names)
        for name in wanted:
            if name not in self:
                raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        scale_of = self._fp8.scales
        scales = dict(self._as_stored(scale_of[name] for name in wanted if name in scale_of))
        scales = {name: scale.clone() for name, scale in scales.items()}
        return {
            name: self._fp8.widened(tensor, scales[scale_of[name]])
            if name in scale_of
            else tensor.clone()
            for name, tensor in self._as_stored(wanted)
        }

    def _as_stored(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors in the files' own memory, shard by shard."""
        for shard, members in self._by_shard(names).items():
            with safe_open(self.folder / shard, framework="pt") as file:
                for name in members:
                    yield name, file.get_tensor(self._stored[name])

    def _by_shard(self, names: Iterable[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._headers[name].shard, []).append(name)
        return found

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the kernel read tensors from the disk in the background: into its page cache, where
        `tensors` finds them, and into no memory of this process. Without effect where a system
        does not offer that."""
        if not hasattr(os, "posix_fadvise"):
            return
        for shard, members in self._by_shard(names).items():
            with (self.folder / shard).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for name in members:
                    offsets = header[self._stored[name]]["data_offsets"]
                    first, last = (8 + length + offset for offset in offsets)
                    for start in range(first, last, _AHEAD):
                        piece = file.fileno(), start, min(_AHEAD, last - start)
                        os.posix_fadvise(*piece, os.POSIX_FADV_WILLNEED)

    def shape_and_type(self, name: str) -> tuple[list[int], str]:
        """Shape and safetensors type (`BF16`, `I32`, …) of a tensor as `tensor` gives it."""
        header = self._headers[name]
        if name in self._fp8.scales:
            return header.shape, "F16" if self._fp8.dtype == torch.float16 else "BF16"
        return header.shape, header.dtype

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
                    f"{self.folder / self._headers[name].shard}: tensor {name} has {kind}"
                )


def stored_type(folder: Path) -> torch.dtype:
    """FP16 where all floats of a checkpoint are stored so, else BF16."""
    try:
        kinds = {header.dtype for header in headers_of(folder).values()}
    except CheckpointError:  # a configuration alone, or what the reader will refuse
        return torch.bfloat16
    floats = {kind for kind in kinds if kind.startswith(("F", "BF"))}
    return torch.float16 if floats == {"F16"} else torch.bfloat16


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
