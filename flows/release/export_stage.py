"""The exports of a release, between its verdict and its registration."""

from dataclasses import replace

from prefect.artifacts import create_table_artifact

from dpq_core.recipe import Recipe
from dpq_core.verdict.gates import Verdict
from flows.release.candidate import Attempt, gate
from flows.reporting.prefect_artifacts import gate_rows, standings
from infra.registry.tracking import TrackedRun
from infra.store import ArtifactRef
from tasks.evaluate import Measured
from tasks.export import Export, cards, export
from tasks.support.progress import stepper


def with_exports(baseline: Measured, attempt: Attempt) -> tuple[Attempt, list[Export]]:
    """The attempt judged with its exports, where it passed without them; to be called in a flow.

    A release that is registered as promoted has every export that its recipe asks for, verified: a
    failed verification is a failed check of integrity.
    """
    recipe, checkpoint = attempt.recipe, attempt.candidate.checkpoint
    if not recipe.export or attempt.verdict.verdict != "promoted":
        return attempt, []
    step = stepper("export", len(recipe.export))
    exports: list[Export] = []
    for name in recipe.export:
        exports.append(export(recipe, checkpoint, name))
        step()
    integrity = {f"export {each.name}": each.wrong for each in exports}
    candidate = replace(attempt.candidate, integrity=attempt.candidate.integrity | integrity)
    judged = replace(attempt, candidate=candidate)
    if any(integrity.values()):
        verdict = gate(recipe, baseline, attempt.measured, candidate, attempt.ratios)
        judged = replace(judged, verdict=verdict)
    return judged, exports


def write_cards(
    run: TrackedRun,
    recipe: Recipe,
    checkpoint: ArtifactRef,
    exports: list[Export],
    verdict: Verdict,
) -> None:
    """Model cards with the gate table; the exports as a table on the run page and in MLflow."""
    gates, said = gate_rows(verdict.metrics), standings(verdict.metrics)
    cards(run, recipe, checkpoint, exports, verdict.verdict, gates, said)
    rows = [each.as_row() for each in exports]
    if rows:
        create_table_artifact(rows, key="exports", description="Other formats, and their checks")
        run.log_table(rows, "exports")
        run.set_tags({f"export.{each.name}": each.artifact.uri for each in exports})
