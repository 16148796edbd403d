"""Make a release's report, keep it in MLflow, and link it from the Prefect run page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from dpq_core.benchmark.throughput import Times
from dpq_core.checkpoint.bytes_by_part import bytes_by_part
from dpq_core.checkpoint.native import QuantizedCheckpoint
from dpq_core.errors import one_line
from dpq_core.evaluation.text_divergence import Spot
from dpq_core.model.reader import CheckpointReader
from flows.release.candidate import Attempt
from infra.orchestration.services import mlflow_server
from infra.registry.history import newest_versions
from infra.registry.tracking import TrackedRun
from infra.settings import home
from tasks.export import Export
from tasks.register import Registration
from tasks.support.environment import hardware, seeds, versions
from tasks.support.model import Model

if TYPE_CHECKING:
    from flows.reporting.report_data import ReportData

FILE = "report.html"
_MOST = 30  # versions


@dataclass(frozen=True)
class Outcome:
    """What a report tells besides the last attempt's numbers."""

    model: Model
    attempt: Attempt
    registration: Registration
    exports: Sequence[Export]
    parts: Mapping[str, Sequence[Mapping[str, Any]]]
    rounds: Sequence[Mapping[str, Any]]
    speeds: Sequence[Times] = ()
    spots: Sequence[Spot] = ()
    attested: str | None = None


@dataclass(frozen=True)
class Report:
    """Where a report is; `error`: why there is none."""

    address: str | None
    error: str | None = None


def report_or_error(run: TrackedRun, tracking_uri: str, outcome: Outcome) -> Report:
    """The report, or why there is none.

    By now the release is judged and registered: an error here changes neither, and shows as a
    failed task, in the log, as the run's tag `report`, on the terminal and in `--json`. It is no
    reason of the verdict, which is about the model.
    """
    try:
        address = make_report(run, tracking_uri, outcome)
        # A browser opens no file from a page that a server gave it.
        shown = run.link(FILE, mlflow_server(tracking_uri, home()))
        create_link_artifact(shown, key="report", description=f"The release report: {address}")
        return Report(address)
    except Exception as error:
        said = f"{type(error).__name__}: {one_line(error)}"
        get_run_logger().exception("no report: the verdict stands")
        run.set_tags({"report": f"failed: {said}"})
        return Report(None, said)


@task(name="report", cache_policy=NO_CACHE)
def make_report(run: TrackedRun, tracking_uri: str, outcome: Outcome) -> str:
    """Write `report.html` to the run; returns the address at which a browser shows it."""
    from flows.reporting.page import page  # matplotlib: a second

    run.log_text(page(_gathered(run, tracking_uri, outcome)), FILE)
    address = run.link(FILE)
    run.set_tags({"report": address})
    return address


def _gathered(run: TrackedRun, tracking_uri: str, outcome: Outcome) -> "ReportData":
    from flows.reporting.report_data import ReportData

    attempt, registration = outcome.attempt, outcome.registration
    recipe, candidate = attempt.recipe, attempt.candidate
    return ReportData(
        made=datetime.now(UTC),
        recipe=recipe,
        name=registration.name,
        version=registration.version,
        verdict=registration.verdict,
        previous_champion=registration.previous_champion,
        manifest=candidate.manifest,
        checkpoint=str(candidate.checkpoint.folder),
        checkpoint_sha256=candidate.checkpoint.sha256,
        run=run.url,
        sizes=(_weight_bytes(outcome.model.folder), _weight_bytes(candidate.checkpoint.folder)),
        checks=candidate.integrity,
        past=newest_versions(tracking_uri, registration.name, _MOST),
        exports=[each.as_row() for each in outcome.exports],
        rounds=outcome.rounds,
        parts=outcome.parts,
        speeds=outcome.speeds,
        spots=outcome.spots,
        attested=outcome.attested,
        bytes_by_part=bytes_by_part(
            QuantizedCheckpoint(candidate.checkpoint.folder, recipe.model.trust_remote_code)
        ),
        environment={
            "Random seeds": seeds(recipe),
            "Versions": versions(),
            "Hardware": {**hardware("cpu"), "device": candidate.inputs.worker.title},
        },
    )


def _weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's safetensors."""
    files = CheckpointReader(folder).files
    return sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
