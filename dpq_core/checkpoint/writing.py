"""Writing a native checkpoint: `dpq_core.checkpoint.native` says what is in it."""

import json
import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dpq_core.checkpoint.native import FORMAT_VERSION, MANIFEST
from dpq_core.checkpoint.shards import ShardWriter, digests_of
from dpq_core.digests import write_json
from dpq_core.layer.kv_cache import CacheMaxima
from dpq_core.layer.records import QuantizedLinear
from dpq_core.layer.storage import layer_tensors
from dpq_core.model.plan import Plan
from dpq_core.model.quantization import OF_OTHERS
from dpq_core.model.reader import CheckpointReader, read_config, side_files
from dpq_core.recipe.scheme import Scheme

_SHARD_BYTES = 256 << 20  # bounds the writer's memory


def write_checkpoint(
    folder: Path,
    source: CheckpointReader,
    dtype: torch.dtype,
    plan: Plan,
    scheme: Scheme,
    layer: Callable[[str], QuantizedLinear],
    about: Mapping[str, Any],
    wide: Container[str] = (),
    cache: Mapping[str, CacheMaxima] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write a native checkpoint, tensor by tensor; memory is bounded by one shard.

    Args:
        folder: exists and is empty.
        source: the base checkpoint, for all that is not quantized.
        dtype: of the tensors that are not quantized.
        layer: gives a quantized layer by name; called once for each.
        about: provenance for the manifest (`base_model`, `calibration`, …).
        wide: tensors that keep their type, see `BlockStream.wide`.
        cache: of attentions by name, where the scheme keeps keys and values in FP8.

    Returns:
        The manifest.
    """
    shards = ShardWriter(folder, _SHARD_BYTES)
    rows: list[dict[str, Any]] = []
    planned = {f"{item.name}.weight": item for item in plan.layers}
    for name in source.names:
        if name not in planned:
            tensor = source.tensor(name)
            narrow = tensor.is_floating_point() and name not in wide
            shards.add(name, tensor.to(dtype) if narrow else tensor)
            continue
        item = planned[name]
        quantized = layer(item.name)
        tensors = layer_tensors(quantized)
        for suffix, tensor in tensors.items():
            shards.add(f"{item.name}.{suffix}", tensor)
        row: dict[str, Any] = {"name": item.name, "shape": [item.rows, item.features]}
        row |= {"bytes": sum(t.nbytes for t in tensors.values())}
        row["scheme"] = _changes(scheme, quantized.scheme)
        if item.outside:
            row["outside"] = item.outside
        rows.append(row | quantized.report.as_row())
    for name, maxima in cache.items():
        for suffix, tensor in maxima.scales(scheme.kv_cache_scale).tensors(dtype).items():
            shards.add(f"{name}.{suffix}", tensor)
    shards.close()
    _write_side_files(folder, source.folder, scheme, dtype, rows)
    order = {item.name: position for position, item in enumerate(plan.layers)}
    rows.sort(key=lambda row: order[row["name"]])
    weights = sum(item.weights for item in plan.layers)
    manifest = {
        "format_version": FORMAT_VERSION,
        **about,
        "scheme": scheme.model_dump(mode="json"),
        "bytes_per_weight": sum(row["bytes"] for row in rows) / weights,
        **_about_cache(cache),
        "layers": rows,
        "skipped": plan.skipped | {row["name"]: row["kept"] for row in rows if row["kept"]},
        "files": digests_of(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _about_cache(cache: Mapping[str, CacheMaxima]) -> dict[str, Any]:
    """Shapes of what attentions keep of a token in FP8, [heads, size] of keys and of values."""
    shapes = {n: [list(each.keys.shape), list(each.values.shape)] for n, each in cache.items()}
    return {"kv_cache": shapes} if cache else {}


def _changes(scheme: Scheme, own: Scheme) -> dict[str, Any]:
    """The fields in which a layer's scheme differs from the checkpoint's."""
    base = scheme.model_dump(mode="json")
    return {
        name: value for name, value in own.model_dump(mode="json").items() if base[name] != value
    }


def _write_side_files(
    folder: Path,
    source: Path,
    scheme: Scheme,
    dtype: torch.dtype,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    copy_side_files(source, folder)
    config = read_config(source)
    config.pop("transformers_weights", None)  # the source's files
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": "dpq",
        "format_version": FORMAT_VERSION,
        **scheme.model_dump(mode="json"),
        "layers": {row["name"]: row["scheme"] for row in rows if row["scheme"]},
    }
    write_json(folder / "config.json", config)


def copy_side_files(source: Path, folder: Path) -> None:
    """Configuration, tokenizer, chat template, processor, generation settings, and the model's own
    code, as they are; but for files that say how the source was quantized."""
    for path in side_files(source):
        if path.name in OF_OTHERS:
            continue
        shutil.copyfile(path, folder / path.name)
