"""Register a release's checkpoint, and move the champion if it was promoted."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency

from dpq_core.digests import digest
from dpq_core.gates import Verdict
from dpq_core.recipe import Recipe
from infra.registry import Registry
from infra.store import ArtifactRef, Store
from tasks.model import Model

PROMOTION = "promotion"  # a global concurrency limit of Prefect's


@dataclass(frozen=True)
class Registration:
    """Where a release ended up in the registry. verdict: `withheld` in place of `promoted` where
    the champion changed while the release ran, or the release was rolled back once."""

    name: str
    version: int
    previous_champion: int | None
    verdict: Verdict


@task(name="register", cache_policy=NO_CACHE)
def register(
    tracking_uri: str,
    run_id: str,
    recipe: Recipe,
    model: Model,
    checkpoint: ArtifactRef,
    verdict: Verdict,
    champion_before: int | None,
    source: str | None = None,
    about: Mapping[str, str] | None = None,
) -> Registration:
    """A model version whose source is the checkpoint, in the store or at `source`; a release that
    is registered already is found again. Promotion moves the alias `champion`, one release at a
    time, and only where it is still `champion_before` or this release; any other verdict leaves it
    where it is. about: further tags of the version."""
    registry, store = Registry(tracking_uri), Store(recipe.execution.store)
    name = recipe.registered_name
    identity = digest([recipe.digest, model.digest, checkpoint.sha256])
    tags = {"release_digest": identity}
    store.remember_registry(tracking_uri)
    # The limit, where `dpq deploy` made it, holds for all that use one Prefect server.
    with concurrency(PROMOTION), registry.exclusive(name, store):
        version = registry.find(name, tags)
        if version is None:
            tags |= {"recipe_digest": recipe.digest, "model_digest": model.digest}
            tags |= {"checkpoint_sha256": checkpoint.sha256}
            version = registry.register(name, source or checkpoint.uri, run_id, tags)
        registry.annotate(name, version, about or {})
        if verdict.verdict == "promoted":
            reason = registry.obstacle(name, version, champion_before)
            if reason is None:
                return Registration(name, version, registry.promote(name, version), verdict)
            verdict = replace(verdict, verdict="withheld", reasons=(reason,))
        registry.withhold(name, version, verdict.verdict, verdict.reasons)
        return Registration(name, version, registry.champion(name), verdict)
