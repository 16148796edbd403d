"""What an engine computes of an export, between export and registration."""

from collections.abc import Sequence
from dataclasses import replace

from prefect.artifacts import create_table_artifact

from dpq_core.attestation.statement import FILE
from flows.release.candidate import Attempt, gate
from infra.registry.tracking import TrackedRun
from tasks.attest import attest
from tasks.evaluate import Measured
from tasks.export import Export
from tasks.support.attestation import Attestation


def with_attestation(
    baseline: Measured, attempt: Attempt, exports: Sequence[Export]
) -> tuple[Attempt, Attestation | None]:
    """The attempt judged with what its recipe's engine computes, where it passed without; to be
    called in a flow. Without `gates.attested` a refusal is shown and rejects nothing.

    Raises:
        EngineError: nothing is known of the engine, so there is no verdict.
    """
    recipe = attempt.recipe
    if recipe.attest.engine is None or attempt.verdict.verdict != "promoted":
        return attempt, None
    (served,) = [each for each in exports if each.name == recipe.attest.format]
    found = attest(recipe, served, attempt.candidate.checkpoint)
    if not recipe.gates.attested:
        return attempt, found
    check = {f"{recipe.attest.engine} attests {served.name}": found.wrong}
    candidate = replace(attempt.candidate, integrity=attempt.candidate.integrity | check)
    judged = replace(attempt, candidate=candidate)
    if found.wrong:
        verdict = gate(recipe, baseline, attempt.measured, candidate, attempt.ratios)
        judged = replace(judged, verdict=verdict)
    return judged, found


def log_attestation(run: TrackedRun, found: Attestation | None) -> None:
    """The statement in MLflow; its figures as a table on the run page."""
    if found is None:
        return
    figures, limits = found.predicate["figures"], found.predicate["limits"]
    rows = [{"figure": n, "value": v, "limit": limits.get(n)} for n, v in figures.items()]
    create_table_artifact(rows, key="attestation", description=found.line)
    run.log_dict(found.statement, FILE)
    run.set_tags({"attested": found.line})
