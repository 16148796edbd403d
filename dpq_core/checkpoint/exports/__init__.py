"""Checkpoints for other people's loaders: a format is a row, all are written from the same codes.

    model-0000n-of-0000N.safetensors …   the format's tensors, shards of 4 GB by default
    model.safetensors.index.json         tensor → shard
    config.json, tokenizer files, …      the base model's, with the format's `quantization_config`
    README.md                            the model card; the one file that no digest covers
    export.json                          the manifest, written last: format, native checkpoint,
                                         checks, every tensor's and every file's SHA-256

An export is written tensor by tensor (memory is bounded by a shard), then verified, and only then
has a manifest. One that failed a check says so in its manifest, and counts for nothing.
"""

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dpq_core.checkpoint.exports.card import CARD, model_card
from dpq_core.checkpoint.exports.compressed_tensors import COMPRESSED_TENSORS
from dpq_core.checkpoint.exports.format import ExportError, Format, Quantization, Target, targets_of
from dpq_core.checkpoint.exports.gptq import GPTQ
from dpq_core.checkpoint.exports.inc import FP8_TO_INT, INC
from dpq_core.checkpoint.exports.verify import check_content
from dpq_core.checkpoint.exports.vllm import environment_for
from dpq_core.checkpoint.native import MANIFEST as NATIVE
from dpq_core.checkpoint.native import QuantizedCheckpoint
from dpq_core.checkpoint.shards import ShardWriter, StoredTensor, check_files, digests_of
from dpq_core.checkpoint.writing import copy_side_files
from dpq_core.digests import file_digest, write_json
from dpq_core.layer.storage import expected_shapes
from dpq_core.model.plan import Plan
from dpq_core.model.reader import CheckpointError, read_config, read_json
from dpq_core.recipe import ExportName
from dpq_core.recipe.scheme import Scheme

EXPORTS: dict[ExportName, Format] = {
    "compressed-tensors": COMPRESSED_TENSORS,
    "gptq": GPTQ,
    "inc": INC,
    "fp8_to_int": FP8_TO_INT,
}
MANIFEST = "export.json"
FORMAT_VERSION = 1
SHARD_BYTES = 4_000_000_000


def format_of(name: str) -> Format:
    """The row of a format. ExportError: there is none of that name."""
    for known, form in EXPORTS.items():
        if known == name:
            return form
    raise ExportError(f"{name!r} is no export format: there are {', '.join(EXPORTS)}")


def check_exportable(name: str, targets: Iterable[Target]) -> None:
    """Refuse what a format cannot express, before anything is written.

    Raises:
        ExportError: naming the layer, its scheme, and the way out.
    """
    form = format_of(name)
    for target in targets:
        if form.without_cache and target.base.kv_cache != "none":
            raise ExportError(
                f"{name} cannot hold the scales of an FP8 cache: {form.without_cache}: set"
                " scheme.kv_cache: none, or export as compressed-tensors"
            )
        if reason := form.obstacle(target):
            scheme = target.scheme
            raise ExportError(
                f"{name} cannot hold {target.name} (method {scheme.method}, {scheme.bits} bits, "
                f"group_size {scheme.group_size}, {scheme.activations} activations): {reason}"
            )


def planned_targets(plan: Plan, base: Scheme, dtype: torch.dtype) -> list[Target]:
    """The layers that a plan will make."""
    return [
        Target(layer.name, layer.rows, layer.features, layer.scheme, base, dtype, layer.outside)
        for layer in plan.layers
    ]


def export_checkpoint(
    source: Path, folder: Path, name: str, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Write a native checkpoint in another format, and verify what was written.

    Args:
        folder: exists and is empty.
        name: a row of `EXPORTS`.

    Returns:
        The manifest; its `checks` are None where they passed, else what is wrong.

    Raises:
        CheckpointError, ExportError: before anything is written.
    """
    form, checkpoint = format_of(name), QuantizedCheckpoint(source)
    targets = targets_of(checkpoint)
    check_exportable(name, targets)
    config = form.config(checkpoint)
    written = _write_tensors(folder, checkpoint, form, targets, config, shard_bytes)
    copy_side_files(source, folder)
    write_json(folder / "config.json", read_config(source) | {"quantization_config": config})
    found = check_content(folder, checkpoint, form, targets)
    manifest = {
        "format_version": FORMAT_VERSION,
        "format": name,
        "checkpoint": file_digest(source / NATIVE),
        "bits_per_weight": found.bits_per_weight,
        "distance": found.distance,
        "checks": found.checks,
        "reader": form.reader,
        "vllm_environment": environment_for(targets, name),
        "tolerance": {"logits": form.arithmetic.tolerance, "reason": form.arithmetic.reason},
        "tensors": {stored: asdict(about) for stored, about in written.items()},
        "files": digests_of(folder),
    }
    if not failures(manifest):
        (folder / CARD).write_text(model_card(checkpoint, manifest), "utf-8")
    write_json(folder / MANIFEST, manifest, indent=1)
    return manifest


def _write_tensors(
    folder: Path,
    checkpoint: QuantizedCheckpoint,
    form: Format,
    targets: Iterable[Target],
    config: Quantization,
    shard_bytes: int,
) -> dict[str, StoredTensor]:
    """The shards and their index. All that is no quantized layer is copied as it is."""
    waiting = {target.name: target for target in targets}
    owner = {
        f"{target.name}.{suffix}": target.name
        for target in waiting.values()
        for suffix in expected_shapes(target.rows, target.features, target.scheme)
    }
    shards = ShardWriter(folder, shard_bytes)
    for stored in checkpoint.reader.names:
        if stored not in owner:
            shards.add(stored, checkpoint.reader.tensor(stored))
        elif target := waiting.pop(owner[stored], None):
            layer = checkpoint.layer(target.name)
            if isinstance(layer.weight, torch.Tensor):
                tensors = {"weight": layer.weight.to(target.dtype)}
            else:
                tensors = form.tensors(layer, target, config)
            for suffix, tensor in tensors.items():
                shards.add(f"{target.name}.{suffix}", tensor)
    shards.close()
    return shards.written


def export_to(
    checkpoint: Path, name: str, output: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """An export in `output` (`<checkpoint>-<format>` where that is None), and its manifest.

    It is written beside its place and moved there once it is verified.

    Raises:
        CheckpointError, ExportError: no checkpoint, an unknown format, a layer that it cannot hold,
            a place that is taken, or an export that does not say what the checkpoint says.
    """
    format_of(name)
    place = checkpoint.resolve()
    folder = output or place.with_name(f"{place.name}-{name}")
    if folder.exists():
        raise ExportError(f"{folder} exists: remove it, or name another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        QuantizedCheckpoint(checkpoint).verify()
        manifest = export_checkpoint(checkpoint, written, name)
        if wrong := failures(manifest):
            raise ExportError(f"{checkpoint} as {name}: {'; '.join(wrong)}; nothing was kept")
        written.chmod(0o755)  # mkdtemp's own is for its user alone
        written.rename(folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return folder, manifest


def read_export(folder: Path) -> dict[str, Any]:
    """The manifest of an export.

    Raises:
        CheckpointError: there is none, or of a version that this code does not know.
    """
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {manifest.get('format_version')} is unknown: "
            f"this release reads {FORMAT_VERSION}"
        )
    return manifest


def failures(manifest: Mapping[str, Any]) -> list[str]:
    """The checks of an export that did not pass, and what they found."""
    return [f"{check}: {detail}" for check, detail in manifest["checks"].items() if detail]


def verify(folder: Path) -> str:
    """Compare a native checkpoint or an export with its manifest, every byte; returns which it is.

    Raises:
        CheckpointError: what was damaged, by file and, in an export, by tensor; an export whose
            own checks failed; or a folder that is neither.
    """
    if (folder / NATIVE).is_file():
        QuantizedCheckpoint(folder).verify()
        return "checkpoint"
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder}: neither {NATIVE} nor {MANIFEST}: there is nothing to verify it by"
        )
    manifest = read_export(folder)
    tensors = {name: StoredTensor(**about) for name, about in manifest["tensors"].items()}
    check_files(folder, manifest["files"], tensors)
    if wrong := failures(manifest):
        raise CheckpointError(f"{folder}: this export failed its checks: {'; '.join(wrong)}")
    return f"{manifest['format']} export"
