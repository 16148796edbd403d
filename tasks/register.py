"""Register a release's checkpoint, and move the champion if it was promoted."""

from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.digests import digest
from dpq_core.gates import Verdict
from dpq_core.recipe import Recipe
from infra.registry import Registry
from infra.store import ArtifactRef
from tasks.model import Model


@dataclass(frozen=True)
class Registration:
    """Where a release ended up in the registry."""

    name: str
    version: int
    previous_champion: int | None


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
    found again. Promotion moves the alias `champion`; any other verdict leaves it where it is."""
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
    registry.withhold(name, version, verdict.verdict, verdict.reasons)
    return Registration(name, version, registry.champion(name))
