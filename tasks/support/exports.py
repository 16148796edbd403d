"""Exports as artifacts of a store: one for each checkpoint and format, whoever asks for it."""

from pathlib import Path
from typing import Any

from dpq_core.checkpoint.exports import (
    export_checkpoint,
    export_to,
    failures,
    format_of,
    read_export,
)
from dpq_core.checkpoint.exports.card import CARD, model_card
from dpq_core.checkpoint.exports.format import ExportError
from dpq_core.checkpoint.native import QuantizedCheckpoint
from dpq_core.digests import digest
from dpq_core.machine.device_kinds import kind_of
from infra.store import ArtifactRef, Store, artifact_at
from infra.store.marker import is_store
from tasks.support.stages import computed_by


def stored_export(store: Store, checkpoint: ArtifactRef, name: str) -> ArtifactRef:
    """The checkpoint in the format `name`, written and verified if it is not there yet.

    Raises:
        CheckpointError, ExportError: before anything is written.
    """
    key = digest(
        {
            **computed_by("exports", kind_of("cpu").arithmetic(0)),  # which verifies
            "checkpoint": checkpoint.sha256,
            "format": name,
        }
    )

    def make(folder: Path) -> None:
        export_checkpoint(store.open(checkpoint), folder, name)
        (folder / CARD).unlink(missing_ok=True)  # it is to tell of a release, see `tasks.export`

    return store.get_or_make("exports", key, make)[0]


def export_by_hand(
    checkpoint: Path, name: str, output: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """An export and its manifest: in `output`; without one where releases have theirs if the
    checkpoint is in a store, else beside it. In a store all that lies there has a manifest.

    Raises:
        CheckpointError, ExportError: as `export_to`; an output in a store.
    """
    if output is not None:
        if inside := [each for each in output.resolve().parents if is_store(each)]:
            raise ExportError(
                f"--output {output}: in the store {inside[0]}, which has its own place for exports:"
                " leave it out, or name a folder elsewhere"
            )
        return export_to(checkpoint, name, output)
    if (found := artifact_at(checkpoint.resolve())) is None:
        return export_to(checkpoint, name)
    format_of(name)
    store, artifact = found
    with store.in_use():
        folder = store.open(stored_export(store, artifact, name))
        manifest = read_export(folder)
        if wrong := failures(manifest):
            raise ExportError(f"{checkpoint} as {name}: {'; '.join(wrong)}")
        if not (folder / CARD).is_file():
            card = model_card(QuantizedCheckpoint(artifact.folder), manifest)
            (folder / CARD).write_text(card, "utf-8")
    return folder, manifest
