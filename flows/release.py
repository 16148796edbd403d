"""The release: baseline, quantize, verify, evaluate, gate, register."""

from dataclasses import dataclass
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from dpq_core.device import share_machine
from dpq_core.gates import ACCURACY, MMLU, PERPLEXITY, Verdict, judge
from dpq_core.recipe import Recipe, RecipeError
from flows.quantize import Candidate, make_candidate
from flows.report import publish
from infra.settings import home
from infra.tracking import tracked_run, tracking_store
from tasks.evaluate import Subject, measure_perplexity, measure_suite
from tasks.preflight import Inputs, preflight
from tasks.register import Registration, log_release, register


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
        model = inputs.model
        baseline = measure(recipe, inputs, Subject("baseline", model.folder, model.digest))
        candidate = make_candidate(recipe, inputs)
        checkpoint = candidate.checkpoint
        subject = Subject("candidate", checkpoint.folder, checkpoint.sha256)
        verdict = gate(recipe, baseline, measure(recipe, inputs, subject), candidate)
        log_release(run, recipe, model, candidate.manifest, verdict)
        registration = register(tracking_uri, run.run_id, recipe, model, checkpoint, verdict)
        publish(verdict, candidate.manifest, checkpoint.folder, registration, run.url)
    return Release(verdict, str(checkpoint.folder), run.run_id, registration, candidate.manifest)


def measure(recipe: Recipe, inputs: Inputs, subject: Subject) -> dict[str, float | None]:
    """Metric name → value of one checkpoint: all that the recipe's evaluation names."""
    metrics: dict[str, float | None] = {}
    if inputs.perplexity:
        metrics[PERPLEXITY] = measure_perplexity(recipe, subject, inputs.perplexity).value
    suites = {
        f"accuracy.{suite}": measure_suite(recipe, subject, suite).value
        for suite in recipe.evaluation.suites
    }
    averaged = [value for name, value in suites.items() if name != MMLU]
    if averaged:
        metrics[ACCURACY] = sum(averaged) / len(averaged)
    return metrics | suites


@task(name="gate", cache_policy=NO_CACHE)
def gate(
    recipe: Recipe,
    baseline: dict[str, float | None],
    candidate_metrics: dict[str, float | None],
    candidate: Candidate,
) -> Verdict:
    """The verdict on a candidate."""
    limited = recipe.evaluation.limit is not None
    return judge(baseline, candidate_metrics, candidate.integrity, recipe.gates, limited)
