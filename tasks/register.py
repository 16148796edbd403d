"""Log a release to MLflow, register its checkpoint, and move the champion if it was promoted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.digests import digest
from dpq_core.gates import Verdict
from dpq_core.recipe import Recipe
from infra.registry import Registry
from infra.store import ArtifactRef
from infra.tracking import TrackedRun
from tasks.figures import layer_error_figure
from tasks.model import Model


@dataclass(frozen=True)
class Registration:
    """Where a release ended up in the registry."""

    name: str
    version: int
    previous_champion: int | None


@task(name="log", cache_policy=NO_CACHE)
def log_release(
    run: TrackedRun,
    recipe: Recipe,
    model: Model,
    manifest: Mapping[str, Any],
    verdict: Verdict,
) -> None:
    """Parameters, metrics, the per-layer table and plot, and the verdict."""
    run.log_params(recipe.model_dump(mode="json", exclude={"variants"}))
    run.set_tags({"model_digest": model.digest, "recipe_digest": recipe.digest})
    for name, metric in verdict.metrics.items():
        values = {"baseline": metric.baseline, "candidate": metric.candidate, "delta": metric.delta}
        run.log_metrics({f"{name}.{side}": value for side, value in values.items()})
    run.log_metrics({"bytes_per_weight": manifest["bytes_per_weight"]})
    run.log_table(layer_rows(manifest), "layers")
    run.log_figure(layer_error_figure(manifest), "layer_error.png")
    run.log_dict(verdict.as_dict(), "verdict.json")
    run.set_tags({"verdict": verdict.verdict, "reasons": "; ".join(verdict.reasons)})


@task(name="register", cache_policy=NO_CACHE)
def register(
    tracking_uri: str,
    run_id: str,
    recipe: Recipe,
    model: Model,
    checkpoint: ArtifactRef,
    verdict: Verdict,
) -> Registration:
    """A model version whose source is the checkpoint; a release that is registered already is
    found again. Promotion moves the alias `champion`; rejection leaves it where it is."""
    registry = Registry(tracking_uri)
    name = recipe.registered_name
    identity = digest([recipe.digest, model.digest, checkpoint.sha256])
    tags = {"release_digest": identity}
    version = registry.find(name, tags)
    if version is None:
        tags |= {"recipe_digest": recipe.digest, "model_digest": model.digest}
        tags |= {"checkpoint_sha256": checkpoint.sha256}
        version = registry.register(name, checkpoint.uri, run_id, tags)
    if verdict.verdict == "promoted":
        return Registration(name, version, registry.promote(name, version))
    registry.reject(name, version, verdict.reasons)
    return Registration(name, version, registry.champion(name))


def layer_rows(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The per-layer table of a checkpoint's manifest."""
    return [
        {
            "layer": row["name"],
            "shape": "×".join(str(side) for side in row["shape"]),
            "error": row["error"],
            "bits per weight": 8 * row["bytes"] / (row["shape"][0] * row["shape"][1]),
            "damping": row["damp_frac"],
            "codes moved": row["codes_moved"],
        }
        for row in manifest["layers"]
    ]
