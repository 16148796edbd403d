"""Write a checkpoint in a format of other people's loaders, and tell what a release measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

import dpq_core
from dpq_core.attestation.statement import FILE, read_statement, summary
from dpq_core.checkpoint.exports import failures, read_export
from dpq_core.checkpoint.exports.card import CARD, model_card
from dpq_core.checkpoint.native import QuantizedCheckpoint
from dpq_core.recipe import Recipe
from dpq_core.serving import pyfunc
from infra.registry.flavor import TextModel, write_flavor
from infra.registry.tracking import TrackedRun
from infra.store import ArtifactRef, Store
from tasks.support.exports import stored_export

_GENERATOR = TextModel(
    pyfunc.__name__, Path(dpq_core.__file__).parent, pyfunc.REQUIREMENTS, pyfunc.PARAMETERS
)


@dataclass(frozen=True)
class Export:
    """An export, and its manifest, which says whether it was verified."""

    name: str
    artifact: ArtifactRef
    manifest: dict[str, Any]

    @property
    def wrong(self) -> str | None:
        """What its checks found."""
        return "; ".join(failures(self.manifest)) or None

    @property
    def attested(self) -> str | None:
        """What the statement that lies beside it says of an engine."""
        path = self.artifact.folder / FILE
        return summary(read_statement(path)["predicate"]) if path.is_file() else None

    def as_row(self) -> dict[str, Any]:
        return {
            "format": self.name,
            "folder": str(self.artifact.folder),
            "sha256": self.artifact.sha256,
            "bytes": self.artifact.size,
            "bits per weight": self.manifest["bits_per_weight"],
            "distance": self.manifest["distance"],
            "verification": self.wrong or "passed",
        }


@task(name="export", task_run_name="export {name}", cache_policy=NO_CACHE)
def export(recipe: Recipe, checkpoint: ArtifactRef, name: str) -> Export:
    """The checkpoint in the format `name`, written and verified once for each checkpoint.

    Raises:
        CheckpointError, ExportError: before anything is written.
    """
    store = Store(recipe.execution.store)
    artifact = stored_export(store, checkpoint, name)
    return Export(name, artifact, read_export(store.open(artifact)))


@task(name="cards", cache_policy=NO_CACHE)
def cards(
    run: TrackedRun,
    recipe: Recipe,
    checkpoint: ArtifactRef,
    exports: Sequence[Export],
    verdict: str,
    gates: Sequence[Mapping[str, str]],
    standings: str = "",
) -> None:
    """README.md of the checkpoint (in the MLflow run as well) and of its exports; and what makes
    the checkpoint's folder a model that MLflow loads and serves.

    Both lie beside what the store and the manifests have digests of: the same checkpoint may be
    released again, under other gates.
    """
    native = QuantizedCheckpoint(checkpoint.folder, recipe.model.trust_remote_code)
    card = model_card(native, None, verdict, gates, standings)
    (checkpoint.folder / CARD).write_text(card, "utf-8")
    run.log_text(card, CARD)
    write_flavor(checkpoint.folder, _GENERATOR)
    for each in exports:
        if each.wrong:
            continue
        card = model_card(native, each.manifest, verdict, gates, standings, each.attested)
        (each.artifact.folder / CARD).write_text(card, "utf-8")
