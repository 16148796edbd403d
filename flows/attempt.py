"""One candidate, from checked inputs to a verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.gates import Verdict, compare, judge
from dpq_core.pairing import CONFIDENCE, Failure
from dpq_core.recipe import Recipe
from flows.measure import measure
from flows.quantize import Candidate, make_candidate
from infra.store import Store
from tasks.evaluate import Measured, Subject, load_evaluation
from tasks.model import content_digest
from tasks.preflight import Inputs


@dataclass(frozen=True)
class Attempt:
    """A candidate, what was measured of it, and the verdict. predicted: its increase of perplexity
    as planned; None for the first. ratios: of its speed, by kind of device; None before it was
    timed."""

    recipe: Recipe
    candidate: Candidate
    measured: Measured
    verdict: Verdict
    predicted: float | None = None
    ratios: Mapping[str, float | Failure] | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * float(self.candidate.manifest["bytes_per_weight"])

    def because(self, reason: str) -> "Attempt":
        """The same, with one more reason for its verdict."""
        reasons = (*self.verdict.reasons, reason)
        return replace(self, verdict=replace(self.verdict, reasons=reasons))


def attempt(
    recipe: Recipe, inputs: Inputs, baseline: Measured, predicted: float | None = None
) -> Attempt:
    """Make a candidate, measure it, judge it; to be called inside a flow with `task_runner(…)`."""
    candidate = make_candidate(recipe, inputs)
    measured = measure(recipe, inputs.evaluation, subject_of(recipe, candidate, "candidate"))
    verdict = gate(recipe, baseline, measured, candidate)
    return Attempt(recipe, candidate, measured, verdict, predicted)


def subject_of(recipe: Recipe, candidate: Candidate, role: str) -> Subject:
    """A candidate to measure, under the digest that `dpq evaluate` gives the same checkpoint."""
    folder = candidate.checkpoint.folder
    return Subject(role, folder, content_digest(folder, Store(recipe.execution.store)))


@task(name="gate", cache_policy=NO_CACHE)
def gate(
    recipe: Recipe,
    baseline: Measured,
    measured: Measured,
    candidate: Candidate,
    ratios: Mapping[str, float | Failure] | None = None,
) -> Verdict:
    """The verdict on a candidate."""
    store = Store(recipe.execution.store)
    differences = compare(
        load_evaluation(baseline, store),
        load_evaluation(measured, store),
        recipe.gates.confidence or CONFIDENCE,
    )
    limited = recipe.evaluation.limit is not None
    return judge(differences, candidate.integrity, recipe.gates, limited, ratios)
