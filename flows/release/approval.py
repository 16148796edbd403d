"""`gates.approval: required`: a person's word on a release that passed its gates.

The run pauses and its process waits (`prefect.flow_runs.pause_flow_run`): the dashboard shows a
form, `dpq approve` and `dpq reject` answer it. Suspending, which ends the process and starts the
flow from the top, needs a deployment, which `dpq release` has not; it would look for the champion
anew, and its time-out fails the run.

Nobody's answer is an answer: when the time is up, the run itself answers with a rejection, by the
way that a person takes. Prefect's own time-out comes later, for runs whose process is gone.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.states import Running
from pydantic import Field

from dpq_core.recipe import GatesSection
from dpq_core.verdict.gates import Verdict
from flows.reporting.prefect_artifacts import gate_rows
from infra.orchestration.client import ClientError, answer
from tasks.support.markdown import markdown_table
from tasks.support.progress import stepper

_NOBODY = "nobody"
_POLL = 2  # s between two looks for an answer
_MARGIN = 600  # s after which Prefect ends what did not end itself


class Decision(RunInput):
    """The form: whether the release becomes champion, who says so, and why."""

    approve: bool = Field(False, description="make this release the champion")
    by: str = Field(min_length=1, description="who decides; kept with the model version")
    reason: str = Field(min_length=1, description="kept with the model version")


def approved(verdict: Verdict, gates: GatesSection) -> tuple[Verdict, dict[str, str]]:
    """The verdict after a person's word, and the model version's tags about it. No flow run, no
    gates that ask for it, or another verdict than `promoted`: nobody is asked."""
    context = FlowRunContext.get()
    if gates.approval == "none" or verdict.verdict != "promoted" or not context:
        return verdict, {}
    assert context.flow_run is not None
    run, limit = context.flow_run.id, gates.approval_timeout
    step = stepper(f"wait for dpq approve|reject {run}", 1)
    form = Decision.with_initial_data(description=_table(verdict))
    _revive(run)
    with _answering_after(limit, run):
        decision = pause_flow_run(form, timeout=limit + _MARGIN, poll_interval=_POLL)
    step()
    word = "approved" if decision.approve else "rejected"
    tags = {"approval": word, "approval_by": decision.by, "approval_reason": decision.reason}
    if decision.approve:
        return verdict, tags
    reason = f"approval: rejected by {decision.by}: {decision.reason}"
    return replace(verdict, verdict="rejected", reasons=(reason,)), tags


def _revive(run: UUID) -> None:
    """Who was taken for dead (a machine that slept sends no heartbeats) could not be paused."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run).state
        if state and state.is_crashed():
            message = f"It lives. Before: {state.message}"
            client.set_flow_run_state(run, Running(message=message), force=True)


@contextmanager
def _answering_after(limit: float, run: UUID) -> Iterator[None]:
    """Reject for nobody, once the time is up and the run still waits."""
    answered = threading.Event()

    def reject() -> None:
        reason = f"no answer within {limit:g} s (gates.approval_timeout)"
        patience = limit
        while not answered.wait(patience):
            patience = _POLL
            # A server that is away for a moment is asked again; somebody may have been faster.
            with suppress(httpx.HTTPError, ClientError):
                answer(run, False, _NOBODY, reason)

    thread = threading.Thread(target=reject, name="approval's time-out", daemon=True)
    thread.start()
    try:
        yield
    finally:
        answered.set()
        thread.join()


def _table(verdict: Verdict) -> str:
    """The gate table in Markdown, above the form."""
    rows = gate_rows(verdict.metrics)
    names = ("metric", "baseline", "candidate", "delta", "limit", "result")
    lines = [[row[name] for name in names] for row in rows]
    return markdown_table(names, lines)
