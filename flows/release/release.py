"""The release: baseline, quantize, verify, evaluate, gate, export, register."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact

from dpq_core.machine.device import share_machine
from dpq_core.recipe import Recipe, RecipeError
from dpq_core.verdict.gates import Verdict
from flows.benchmark import publish_times, with_benchmark
from flows.release.approval import approved
from flows.release.attest_stage import log_attestation, with_attestation
from flows.release.candidate import Attempt, attempt, baseline_of, check_baseline
from flows.release.export_stage import with_exports, write_cards
from flows.release.measurements import measure
from flows.release.repair import repair, round_rows
from flows.release.repair_options import Options
from flows.release.report_stage import Outcome, Report, report_or_error
from flows.reporting.prefect_artifacts import publish, publish_parts, publish_spots
from flows.running.liveness import attended
from infra.memory import watched
from infra.registry import Registry
from infra.registry.tracking import PARENT, TrackedRun, tracked_run, tracking_store
from infra.settings import home
from infra.store import Store
from tasks.export import Export
from tasks.log import log_evaluation, log_metrics, log_release, log_verdict
from tasks.preflight import preflight
from tasks.publish import check_hub, destination_of, published, pushed
from tasks.register import Registration, base_of, register
from tasks.support.attestation import check_engine
from tasks.support.chunks import Comparison
from tasks.support.divergences import spots_of
from tasks.support.memory import MemoryUse, check_states_room


@dataclass(frozen=True)
class Release:
    """What came of a release. attested: what an engine computed, in a line. hub: address of the
    commit there. memory: of quantizing. scoring: of the baseline's evaluation."""

    verdict: Verdict
    checkpoint: str
    run_id: str
    registration: Registration
    manifest: dict[str, Any]
    rounds: list[dict[str, Any]]
    exports: list[Export]
    report: Report
    attested: str | None
    hub: str | None
    memory: MemoryUse
    scoring: MemoryUse

    def as_dict(self) -> dict[str, Any]:
        """The object that `dpq release --json` prints."""
        return {
            **self.verdict.as_dict(),
            "checkpoint": self.checkpoint,
            "run_id": self.run_id,
            "model_version": self.registration.version,
            "registered_model": self.registration.name,
            "rounds": self.rounds,
            "exports": [each.as_row() for each in self.exports],
            "report": self.report.address,
            "report_error": self.report.error,
            "attested": self.attested,
            "hub": self.hub,
        }


@flow(name="release")
@attended
def release(recipe: Recipe) -> Release:
    """Quantize a model, measure it against the 16-bit original, and promote it within the gates.

    Its speed is measured on the devices that the recipe's benchmark names. What passes the gates is
    exported before it is registered: an export that cannot be verified rejects the release, and so
    does one that an engine computes otherwise under `gates.attested`. What is rejected is not
    exported. With `gates.approval: required` a person has the last word.

    Raises:
        The errors of the stages; a rejection is a result and no error. NotMeasuredError: a number
            that a gate needs is missing; nothing is registered, and the next run goes on. HubError:
            after the promotion, which stands.
    """
    if recipe.evaluation.perplexity is None and not recipe.evaluation.suites:
        raise RecipeError("evaluation measures nothing: name a perplexity data set, or suites")
    share_machine(recipe.execution.threads_per_worker)
    tracking_uri, artifact_root = tracking_store(home())
    name, registry = recipe.registered_name, Registry(tracking_uri)
    destination = destination_of(recipe.registry.destination, registry)
    check_hub(recipe)
    check_engine(recipe.attest)
    champion = registry.champion(name)
    tags = {"recipe_digest": recipe.digest, "champion_at_start": str(champion or "")}
    with tracked_run(tracking_uri, recipe.registry.experiment, name, tags, artifact_root) as run:
        inputs = preflight(recipe)
        check_states_room(recipe, inputs.kept_states, inputs.footprint)
        base_of(recipe, inputs.model).check(registry, name, champion)
        model, data = inputs.model, inputs.evaluation
        with watched() as peaks:
            baseline = measure(recipe, data, baseline_of(inputs), Comparison(kept=True))
        scoring = MemoryUse.of(recipe, inputs.scoring, peaks, None)
        check_baseline(recipe, baseline)
        repaired = repair(recipe, inputs, baseline, attempt(recipe, inputs, baseline))
        timed, speeds = with_benchmark(baseline, repaired.last)
        last, exports = with_exports(baseline, timed)
        last, attested = with_attestation(baseline, last, exports)
        repaired.attempts[-1] = last
        checkpoint, manifest = last.candidate.checkpoint, last.candidate.manifest
        log_release(run, last.recipe, model, manifest, last.verdict.metrics)
        memory = repaired.attempts[0].candidate.memory  # later rounds quantize little
        run.log_metrics(memory.as_metrics() | scoring.as_metrics("memory.evaluation"))
        publish_times(run, name, last.recipe, speeds)
        parts = log_evaluation(run, recipe, {"baseline": baseline, "candidate": last.measured})
        judged, approval = approved(last.verdict, recipe.gates)
        about = {"asked_digest": recipe.digest, **approval}
        if attested:
            about["attested"] = attested.line
        log_verdict(run, judged)
        log_attestation(run, attested)
        write_cards(run, recipe, checkpoint, exports, judged)
        source = published(destination, registry, judged, name, checkpoint, exports)
        registration = register(
            tracking_uri,
            run.run_id,
            last.recipe,
            model,
            checkpoint,
            judged,
            champion,
            source,
            about,
        )
        verdict = registration.verdict
        if verdict != judged:
            log_verdict(run, verdict)
            write_cards(run, recipe, checkpoint, exports, verdict)
        publish(verdict, manifest, checkpoint.folder, registration, run.url)
        publish_parts(parts)
        rounds = list(round_rows(repaired.attempts))
        if repaired.options is not None:
            _log_options(run, repaired.options)
        if len(rounds) > 1:
            create_table_artifact(rounds, key="rounds", description="Repair: what each bit bought")
            run.log_table(rounds, "rounds")
            _log_rounds(run, repaired.attempts, rounds, tracking_uri, artifact_root)
        spots = spots_of(last.measured, Store(recipe.execution.store), verdict.judged_on)
        publish_spots(spots)
        said = attested.line if attested else None
        outcome = Outcome(model, last, registration, exports, parts, rounds, speeds, spots, said)
        report = report_or_error(run, tracking_uri, outcome)
        hub = pushed(recipe, model, registry, registration, checkpoint, exports)
    folder = str(checkpoint.folder)
    return Release(
        verdict=verdict,
        checkpoint=folder,
        run_id=run.run_id,
        registration=registration,
        manifest=manifest,
        rounds=rounds,
        exports=exports,
        report=report,
        attested=said,
        hub=hub,
        memory=memory,
        scoring=scoring,
    )


def _log_options(run: TrackedRun, options: Options) -> None:
    """What each choice of each layer costs."""
    rows = list(options.rows())
    create_table_artifact(
        rows, key="sensitivity", description="Loss of each choice in nats a token"
    )
    run.log_table(rows, "sensitivity")


def _log_rounds(
    run: TrackedRun,
    attempts: list[Attempt],
    rows: list[dict[str, Any]],
    tracking_uri: str,
    artifact_root: Path | None,
) -> None:
    """A nested run for each round, with its layers' choices and what was looked at."""
    for number, (each, row) in enumerate(zip(attempts, rows, strict=True)):
        experiment, tags = each.recipe.registry.experiment, {PARENT: run.run_id}
        name = f"round {number}"
        with tracked_run(tracking_uri, experiment, name, tags, artifact_root) as nested:
            nested.log_dict({"layers": each.recipe.layers}, "layers.json")
            numbers = {key.replace(" ", "_"): row[key] for key in row if key != "gates missed"}
            nested.log_metrics(numbers)
            log_metrics(nested, each.look.metrics)
            nested.set_tags({"gates missed": str(row["gates missed"])})
