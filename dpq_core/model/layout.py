"""Which files of a folder hold a checkpoint's weights: those that transformers takes.

    config.json names `transformers_weights`   that file, or the shards of that index
    model.safetensors                          it alone, whatever index lies beside it
    model.safetensors.index.json               the shards that it names, with all that they hold

Whatever else is there (GGUF, `consolidated.safetensors`, `model.fp16.safetensors`, shards that no
index names, pickles) transformers does not take, and neither do we. What it resolves by its
environment or by chance is refused: an adapter beside weights (it counts where `peft` is
installed), a tensor in two shards (the last one read would count).

Source: `_get_resolved_checkpoint_files` of transformers 5.18, `modeling_utils.py`.
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dpq_core.errors import CheckpointError
from dpq_core.model.json_files import read_config, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
_INDEX_ENDING = ".safetensors.index.json"
_LFS = b"version https://git-lfs"
# What the weights could be, by the ends of files' names, where none of ours is there.
_OTHERS = {
    "adapter_model.safetensors": "an adapter: merge it into its model (merge_and_unload)",
    ".safetensors": "not named as transformers names weights: rename it, or save_pretrained again",
    ".gguf": "GGUF, which is not read: give the checkpoint that it was made of, or `dpq import` it",
    ".bin": "pickled weights, which are not loaded: convert them to safetensors (save_pretrained)",
    ".pt": "pickled weights, which are not loaded: convert them to safetensors (save_pretrained)",
    ".pth": "pickled weights, which are not loaded: convert them to safetensors (save_pretrained)",
}


@dataclass(frozen=True)
class Header:
    """What a file's header says of a tensor. dtype: safetensors' name of it (`BF16`, `I32`, …)."""

    shard: str
    shape: list[int]
    dtype: str


def headers_of(folder: Path) -> dict[str, Header]:
    """All tensors of a checkpoint by stored name; nothing but headers is read.

    Raises:
        CheckpointError: no weights, a shard missing or damaged, an index that lies, a tensor in
            two shards, an adapter.
    """
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder / ADAPTER}: an adapter, which stands for another model's weights with its"
            " changes: merge it (merge_and_unload); where that was done, delete this file"
        )
    index_name, shards = _taken(folder)
    index = {} if index_name is None else _read_index(folder / index_name)
    found: dict[str, Header] = {}
    for shard in shards or sorted(set(index.values())):
        for name, header in _headers_in(folder, shard).items():
            if name in found:
                raise CheckpointError(
                    f"{folder}: tensor {name} is in {found[name].shard} and in {shard}: which one"
                    " counts would be chance: save the model again"
                )
            found[name] = header
    for name, shard in index.items():
        if name not in found or found[name].shard != shard:
            raise CheckpointError(f"{folder / shard}: tensor {name} is missing")
    return found


def _taken(folder: Path) -> tuple[str | None, list[str]]:
    """The index that counts, or the one file."""
    named = None
    if (folder / "config.json").is_file():
        named = read_config(folder).get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named:
            raise CheckpointError(
                f"{folder / 'config.json'}: transformers_weights {named!r} is not a plain file name"
            )
        return (named, []) if named.endswith(_INDEX_ENDING) else (None, [named])
    if (folder / SINGLE).is_file():
        return None, [SINGLE]
    if (folder / INDEX).is_file():
        return INDEX, []
    raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}{_found_instead(folder)}")


def _found_instead(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for ending, what in _OTHERS.items():
        for name in names:
            if name.endswith(ending):
                return f", but {name}: {what}"
    return ""


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
        raise CheckpointError(f"{path}: no valid weight_map")
    escaping = [shard for shard in index.values() if Path(shard).name != shard]
    if escaping:
        raise CheckpointError(f"{path}: {escaping[0]} is not a plain file name")
    return index


def _headers_in(folder: Path, shard: str) -> dict[str, Header]:
    path = folder / shard
    if not path.is_file():
        raise CheckpointError(f"{path}: shard is missing")
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Header(shard, list(part.get_shape()), str(part.get_dtype()))
                for name, part in parts.items()
            }
    except SafetensorError as error:
        with path.open("rb") as raw:
            if raw.read(len(_LFS)) == _LFS:
                raise CheckpointError(
                    f"{path}: a pointer of Git LFS, not the weights: `git lfs pull` fetches them"
                ) from error
        raise CheckpointError(f"{path}: truncated or damaged ({error})") from error
