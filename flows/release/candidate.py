"""One candidate, from checked inputs to a verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.recipe import Recipe
from dpq_core.verdict.comparison import compare
from dpq_core.verdict.gates import Verdict, judge
from dpq_core.verdict.halves import ALL, CHOOSING, JUDGING, those
from dpq_core.verdict.pairing import CONFIDENCE, Failure
from flows.quantize import Candidate, make_candidate
from flows.release.measurements import measure
from infra.store import Store
from tasks.evaluate import Measured, load_evaluation
from tasks.preflight import Inputs
from tasks.support.chunks import Comparison, Subject
from tasks.support.divergences import divergence_of
from tasks.support.model import content_digest


@dataclass(frozen=True)
class Attempt:
    """A candidate, what was measured of it, and the verdict. With repair that is first a look at
    the documents that choose, and once nothing is chosen any more the verdict of the others; `look`
    stays. predicted: its increase of perplexity as planned; None for the first. ratios: of its
    speed, by kind of device; None before it was timed."""

    recipe: Recipe
    candidate: Candidate
    measured: Measured
    look: Verdict
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
    """Make a candidate, measure it, look at it; to be called inside a flow with `task_runner(…)`.

    Raises:
        NotMeasuredError: a number is missing: no verdict.
    """
    candidate = make_candidate(recipe, inputs)
    data, reference = inputs.evaluation, baseline_of(inputs)
    subject = subject_of(recipe, candidate, "candidate")
    measured = measure(recipe, data, subject, Comparison(reference=reference))
    look = gate(recipe, baseline, measured, candidate, chooses=recipe.repair.enabled)
    return Attempt(recipe, candidate, measured, look, look, predicted)


def judged(attempt: Attempt, baseline: Measured) -> Attempt:
    """The attempt with the verdict of the documents that judge."""
    if not attempt.recipe.repair.enabled:
        return attempt
    verdict = gate(attempt.recipe, baseline, attempt.measured, attempt.candidate, attempt.ratios)
    return replace(attempt, verdict=verdict)


def baseline_of(inputs: Inputs) -> Subject:
    """The original to measure, as what candidates are quantized from."""
    return Subject("baseline", inputs.model.folder, inputs.model.digest, source=True)


def subject_of(recipe: Recipe, candidate: Candidate, role: str) -> Subject:
    """A candidate to measure, under the digest that `dpq evaluate` gives the same checkpoint."""
    folder = candidate.checkpoint.folder
    digest = content_digest(folder, Store(recipe.execution.store))
    return Subject(role, folder, digest, served=recipe.evaluation.served)


@task(name="gate", cache_policy=NO_CACHE)
def gate(
    recipe: Recipe,
    baseline: Measured,
    measured: Measured,
    candidate: Candidate,
    ratios: Mapping[str, float | Failure] | None = None,
    chooses: bool = False,
) -> Verdict:
    """The verdict on a candidate; with `chooses` what the gates say on the documents that choose.

    Raises:
        NotMeasuredError: a number is missing: no verdict.
    """
    verdict = _judge(recipe, baseline, measured, candidate.integrity, ratios, chooses)
    return verdict.or_error("the candidate")


def check_baseline(recipe: Recipe, baseline: Measured) -> None:
    """Whether candidates can be judged at all, before any is paid for: the gates are applied to the
    baseline itself.

    Raises:
        NotMeasuredError: a number is missing.
    """
    # It has no divergence, of which it would be none.
    gates = recipe.gates.model_copy(update={"divergence": None, "top1_agreement": None})
    own = recipe.model_copy(update={"gates": gates})
    _judge(own, baseline, baseline, {}).or_error("the baseline")
    if recipe.repair.enabled:
        _judge(own, baseline, baseline, {}, chooses=True).or_error("the baseline")


def _judge(
    recipe: Recipe,
    baseline: Measured,
    measured: Measured,
    integrity: Mapping[str, str | None],
    ratios: Mapping[str, float | Failure] | None = None,
    chooses: bool = False,
) -> Verdict:
    store, judged_on = Store(recipe.execution.store), ALL
    if recipe.repair.enabled:
        judged_on = CHOOSING if chooses else JUDGING
    before, after = (those(load_evaluation(m, store), judged_on) for m in (baseline, measured))
    divergence = divergence_of(measured, store, judged_on)
    differences = compare(before, after, recipe.gates.confidence or CONFIDENCE, divergence)
    limited = "evaluation.limit" if recipe.evaluation.limit is not None else None
    return judge(differences, integrity, recipe.gates, limited, ratios, judged_on)
