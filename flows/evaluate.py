"""Measure any checkpoint (16 bits, native W4A8, a third party's), alone or against another."""

from dataclasses import asdict, dataclass
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact

from dpq_core.checkpoint.native import MANIFEST
from dpq_core.errors import CheckpointError
from dpq_core.evaluation.scores import PERPLEXITY
from dpq_core.evaluation.text_divergence import TextDivergence
from dpq_core.machine.device import share_machine
from dpq_core.model.streaming import load_config
from dpq_core.recipe import Recipe, RecipeError
from dpq_core.verdict.comparison import compare
from dpq_core.verdict.gates import judge
from dpq_core.verdict.halves import ALL
from dpq_core.verdict.pairing import CONFIDENCE, Evaluation, Failure
from dpq_core.verdict.standing import Metric
from flows.release.measurements import measure
from flows.reporting.prefect_artifacts import gate_rows, publish_parts, score_rows
from flows.running.liveness import attended
from infra.registry.tracking import tracked_run, tracking_store
from infra.settings import home
from infra.store import Store
from tasks.evaluate import EvaluationData, Measured, load_evaluation, prepare
from tasks.log import log_evaluation, log_metrics, log_scores
from tasks.support import fitting
from tasks.support.chunks import Comparison, Subject
from tasks.support.divergences import divergence_of
from tasks.support.model import inspect_any, load_tokenizer
from tasks.support.worker import Worker, about_worker


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of a checkpoint; with a baseline, the differences and what the gates say of them.
    complete: whether all was measured that the recipe asks for; else the reasons say what was not,
    and nothing else is said of the gates."""

    checkpoint: str
    against: str | None
    run_id: str
    scores: Evaluation
    metrics: dict[str, Metric]
    reasons: tuple[str, ...]
    complete: bool

    def as_dict(self) -> dict[str, Any]:
        """The object that `dpq evaluate --json` prints. passed: None where nothing was compared, or
        not all was measured."""
        return {
            "checkpoint": self.checkpoint,
            "against": self.against,
            "run_id": self.run_id,
            "scores": score_rows(self.scores),
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            "passed": not self.reasons if self.against and self.complete else None,
            "complete": self.complete,
            "reasons": list(self.reasons),
        }


@flow(name="evaluate")
@attended
def evaluate(recipe: Recipe, checkpoint: str, against: str | None = None) -> EvaluationReport:
    """Run a recipe's evaluation on `checkpoint`, and on `against` as its baseline.

    Both are hub ids or folders. Scores that a release has stored are found again.

    Raises:
        RecipeError: nothing to measure. CheckpointError, ContextError, DataError, MirrorError,
            RuntimeUnavailableError, SuiteError: one line that says what and where.
    """
    if recipe.evaluation.perplexity is None and not recipe.evaluation.suites:
        raise RecipeError("evaluation measures nothing: name a perplexity data set, or suites")
    share_machine(recipe.execution.threads_per_worker)
    worker = about_worker.submit(recipe).result()  # it has the device, or says so before all else
    roles = {"baseline": against, "candidate": checkpoint}
    tracking_uri, artifact_root = tracking_store(home())
    tags = {"recipe_digest": recipe.digest, "checkpoint": checkpoint, "against": against or ""}
    name = f"evaluate {recipe.registered_name}"
    with tracked_run(tracking_uri, recipe.registry.experiment, name, tags, artifact_root) as run:
        found = {r: _inspect(recipe, r, path, worker) for r, path in roles.items() if path}
        measured = _measured(recipe, found)
        store = Store(recipe.execution.store)
        scores = {role: load_evaluation(each, store) for role, each in measured.items()}
        divergence = divergence_of(measured["candidate"], store, ALL)
        metrics, reasons, complete = _compared(recipe, scores, divergence)
        log_scores(run, scores)
        log_metrics(run, metrics)
        parts = log_evaluation(run, recipe, measured)
        create_table_artifact(score_rows(scores["candidate"]), key="scores")
        if metrics:
            create_table_artifact(gate_rows(metrics), key="gates")
        publish_parts(parts)
    own = scores["candidate"]
    return EvaluationReport(checkpoint, against, run.run_id, own, metrics, reasons, complete)


def _measured(
    recipe: Recipe, found: dict[str, tuple[Subject, EvaluationData]]
) -> dict[str, Measured]:
    """Of both; the predictions are compared where both read the same tokens."""
    asked = [data.requests.get(PERPLEXITY) for _, data in found.values()]
    alike = len(asked) == 2 and asked[0] == asked[1]
    comparisons = dict.fromkeys(found, Comparison())
    if alike:
        comparisons["baseline"] = Comparison(kept=True)
        comparisons["candidate"] = Comparison(reference=found["baseline"][0])
    return {
        role: measure(recipe, data, subject, comparisons[role])
        for role, (subject, data) in found.items()
    }


def _inspect(
    recipe: Recipe, role: str, checkpoint: str, worker: Worker
) -> tuple[Subject, EvaluationData]:
    store = Store(recipe.execution.store)
    trusted = recipe.model.trust_remote_code
    model = inspect_any(checkpoint, store, trusted)
    config = load_config(model.folder, trusted).get_text_config()
    fitting.check_lengths(recipe, config, calibrated=False)
    tokenizer = load_tokenizer(model.folder, trusted)
    data = prepare(recipe.evaluation, tokenizer, config, store, worker.arithmetic)
    fitting.check_ids(config, tokenizer, {"evaluation.perplexity": data.perplexity}, store)
    served = recipe.evaluation.served and role == "candidate"
    if served and not (model.folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{checkpoint}: evaluation.arithmetic is served, and runtimes serve native checkpoints"
            " alone: set it to definition"
        )
    return Subject(role, model.folder, model.digest, served=served), data


def _compared(
    recipe: Recipe, scores: dict[str, Evaluation], divergence: TextDivergence | Failure | None
) -> tuple[dict[str, Metric], tuple[str, ...], bool]:
    """Differences, why the gates would not let them pass, and whether all was measured. Without a
    baseline: what failed."""
    if "baseline" not in scores:
        failed = {n: s for n, s in scores["candidate"].items() if isinstance(s, Failure)}
        reasons = tuple(f"{name}: {failure.reason}" for name, failure in failed.items())
        return {}, reasons, not failed
    confidence = recipe.gates.confidence or CONFIDENCE
    differences = compare(scores["baseline"], scores["candidate"], confidence, divergence)
    limited = "evaluation.limit" if recipe.evaluation.limit is not None else None
    verdict = judge(differences, {}, recipe.gates, limited)
    return verdict.metrics, verdict.reasons, verdict.verdict != "error"
