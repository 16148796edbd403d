"""Attest an export of a release by an engine."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.recipe import Recipe
from infra.store import ArtifactRef, Store
from tasks.export import Export
from tasks.support.attestation import Attestation, attested
from tasks.support.worker import this_worker


@task(name="attest", task_run_name="attest {export.name}", cache_policy=NO_CACHE)
def attest(recipe: Recipe, export: Export, checkpoint: ArtifactRef) -> Attestation:
    """What the recipe's engine computes of an export, beside our own arithmetic; not cached, since
    it is about an engine as it is today.

    Raises:
        EngineError: nothing is known of it: no verdict.
    """
    store = Store(recipe.execution.store)
    folder = store.open(export.artifact)
    gated = recipe.attest.reference == "checkpoint"
    reference = store.open(checkpoint) if gated else None
    return attested(recipe, folder, reference, this_worker(recipe.execution).device)
