"""What automation asks of Prefect: launch a deployment, wait for what comes of it, answer a run.

The name of a run's state stands for the verdict: a deployed release ends `Completed` under the name
`Promoted`, `Rejected`, … (`flows.deployments.deployed`), with the reasons as the state's message, a
line each, and what it made as labels of the run. One GET of a flow run says everything, to whatever
client.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

_LABEL = "dpq."  # prefix of the labels about what a run made
_POLL = 1.0  # s between two looks at a run
_SILENCE = 120.0  # s without an answer of the server, while waiting for a run

Standing = Literal[
    "completed", "promoted", "rejected", "inspected", "withheld", "waiting", "running", "error"
]
_NAMED: tuple[Standing, ...] = ("promoted", "rejected", "inspected", "withheld")
_EXIT_CODES = {"completed": 0, "promoted": 0, "waiting": 3, "running": 4, "error": 1}
_NOT_PROMOTED = 2


class ClientError(RuntimeError):
    """What the server does not know or does not take, with its reason."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run so far: a verdict, or `waiting` for approval, `running` (or about to), an
    `error`; `completed` of runs that have no verdict. made: the labels about its products."""

    run: UUID
    verdict: Standing
    reasons: tuple[str, ...]
    made: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0 promoted, 2 not promoted, 3 waiting for approval, 4 running, 1 error."""
        return _EXIT_CODES.get(self.verdict, _NOT_PROMOTED)

    def as_dict(self) -> dict[str, Any]:
        """The object that `dpq trigger --json` prints."""
        about = {"run": str(self.run), "verdict": self.verdict, "reasons": list(self.reasons)}
        return {**about, **self.made}


def launch(
    deployment: str,
    parameters: Mapping[str, Any],
    key: str | None = None,
    queue: str | None = None,
) -> UUID:
    """Start a run of a deployment (`flow/name`). With a key that a run of it has already, that run
    is meant, whatever the parameters are, and none is started.

    Raises:
        ClientError: no such deployment, or parameters that are none of its.
    """
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(deployment)
            run = client.create_flow_run_from_deployment(
                found.id, parameters=dict(parameters), idempotency_key=key, work_queue_name=queue
            )
        except ObjectNotFound as error:
            raise ClientError(f"{deployment}: no such deployment: run `dpq deploy`") from error
        except PrefectHTTPStatusError as error:
            raise ClientError(f"{deployment}: {error.response.text}") from error
        return run.id


def outcome(run: UUID) -> Outcome:
    """What came of a run until now.

    Raises:
        ClientError: no such run.
    """
    with get_client(sync_client=True) as client:
        try:
            return _outcome(client.read_flow_run(run))
        except ObjectNotFound as error:
            raise ClientError(f"{run}: no such flow run") from error


def wait(run: UUID, timeout: float | None = None) -> Outcome:
    """Wait until a run has ended or waits for approval, at most `timeout` seconds: what came of it
    then. A server that does not answer for a while is asked again.

    Raises:
        ClientError: no such run.
        httpx.TransportError: the server gave no sign for two minutes.
    """
    began = heard = time.monotonic()
    last = Outcome(run, "running", (), {})
    while True:
        try:
            last = outcome(run)
            heard = time.monotonic()
        except httpx.TransportError:
            if time.monotonic() - heard > _SILENCE:
                raise
        left = None if timeout is None else timeout - (time.monotonic() - began)
        if last.verdict != "running" or (left is not None and left <= 0):
            return last
        time.sleep(_POLL if left is None else min(_POLL, left))


def answer(run: UUID, approve: bool, by: str, reason: str) -> None:
    """Answer a run that waits for approval.

    Raises:
        ClientError: it does not wait, or takes no such answer.
    """
    given = {"approve": approve, "by": by, "reason": reason}
    with get_client(sync_client=True) as client:
        standing = outcome(run)
        if standing.verdict != "waiting":
            raise ClientError(f"{run} does not wait for approval: it is {standing.verdict}")
        result = client.resume_flow_run(run, given)
        if result.status != SetStateStatus.ACCEPT:
            raise ClientError(f"{run}: {getattr(result.details, 'reason', result.status.value)}")


def label(made: Mapping[str, Any]) -> None:
    """Say on the present flow run's page what it made; nothing outside of a flow."""
    context = FlowRunContext.get()
    if context and context.flow_run:
        labels = {f"{_LABEL}{key}": value for key, value in made.items()}
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(context.flow_run.id, labels)


def _outcome(run: FlowRun) -> Outcome:
    labels = {k.removeprefix(_LABEL): v for k, v in run.labels.items() if k.startswith(_LABEL)}
    made = {key: value for key, value in labels.items() if key != "process"}
    message = (run.state.message if run.state else None) or ""
    verdict = _standing(run)
    lines = tuple(message.splitlines()) if verdict not in ("running", "waiting") else ()
    return Outcome(run.id, verdict, lines, made)


def _standing(run: FlowRun) -> Standing:
    match run.state_type:
        case StateType.COMPLETED:
            return next(
                (each for each in _NAMED if each == (run.state_name or "").lower()), "completed"
            )
        case StateType.PAUSED:
            return "waiting"
        case StateType.FAILED | StateType.CRASHED | StateType.CANCELLED:
            return "error"
    return "running"
