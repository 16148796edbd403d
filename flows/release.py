"""The release: baseline, quantize, verify, evaluate, gate, register."""

from dataclasses import dataclass
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from dpq_core.device import share_machine
from dpq_core.gates import Verdict, compare, judge
from dpq_core.pairing import CONFIDENCE
from dpq_core.recipe import Recipe, RecipeError
from flows.measure import measure
from flows.quantize import Candidate, make_candidate
from flows.report import publish, publish_parts
from infra.settings import home
from infra.store import Store
from infra.tracking import tracked_run, tracking_store
from tasks.evaluate import Measured, Subject, load_evaluation
from tasks.log import log_evaluation, log_release
from tasks.model import content_digest
from tasks.preflight import preflight
from tasks.register import Registration, register


@dataclass(frozen=True)
class Release:
    """What came of a release."""

    verdict: Verdict
    checkpoint: str
    run_id: str
    registration: Registration
    manifest: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The object that `dpq release --json` prints."""
        return {
            **self.verdict.as_dict(),
            "checkpoint": self.checkpoint,
            "run_id": self.run_id,
            "model_version": self.registration.version,
            "registered_model": self.registration.name,
        }


@flow(name="release")
def release(recipe: Recipe) -> Release:
    """Quantize a model, measure it against the 16-bit original, and promote it within the gates.

    Raises:
        The errors of the stages; a rejection is a result and no error.
    """
    if recipe.evaluation.perplexity is None and not recipe.evaluation.suites:
        raise RecipeError("evaluation measures nothing: name a perplexity data set, or suites")
    share_machine(recipe.execution.threads_per_worker)
    tracking_uri, artifact_root = tracking_store(home())
    name, tags = recipe.registered_name, {"recipe_digest": recipe.digest}
    with tracked_run(tracking_uri, recipe.registry.experiment, name, tags, artifact_root) as run:
        inputs = preflight(recipe)
        model, data = inputs.model, inputs.evaluation
        baseline = measure(recipe, data, Subject("baseline", model.folder, model.digest))
        candidate = make_candidate(recipe, inputs)
        measured = measure(recipe, data, subject_of(recipe, candidate, "candidate"))
        verdict = gate(recipe, baseline, measured, candidate)
        log_release(run, recipe, model, candidate.manifest, verdict)
        parts = log_evaluation(run, recipe, {"baseline": baseline, "candidate": measured})
        checkpoint = candidate.checkpoint
        registration = register(tracking_uri, run.run_id, recipe, model, checkpoint, verdict)
        publish(verdict, candidate.manifest, checkpoint.folder, registration, run.url)
        publish_parts(parts)
    return Release(verdict, str(checkpoint.folder), run.run_id, registration, candidate.manifest)


def subject_of(recipe: Recipe, candidate: Candidate, role: str) -> Subject:
    """A candidate to measure, under the digest that `dpq evaluate` gives the same checkpoint."""
    folder = candidate.checkpoint.folder
    return Subject(role, folder, content_digest(folder, Store(recipe.execution.store)))


@task(name="gate", cache_policy=NO_CACHE)
def gate(recipe: Recipe, baseline: Measured, measured: Measured, candidate: Candidate) -> Verdict:
    """The verdict on a candidate."""
    store = Store(recipe.execution.store)
    differences = compare(
        load_evaluation(baseline, store),
        load_evaluation(measured, store),
        recipe.gates.confidence or CONFIDENCE,
    )
    limited = recipe.evaluation.limit is not None
    return judge(differences, candidate.integrity, recipe.gates, limited)
