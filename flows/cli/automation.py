"""`dpq deploy`, `dpq trigger`, `dpq approve`, `dpq reject`: what release automation calls.

All of them talk to the Prefect server that `PREFECT_API_URL` names, or to the one that a `dpq` of
this folder has left up. Prefect is imported late, as everywhere in the command.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from uuid import UUID

import typer

from dpq_core.errors import InputError
from dpq_core.recipe import DeviceKind
from flows.cli.errors import errors, print_json
from flows.cli.options import AsJson, Overrides
from infra.settings import home

if TYPE_CHECKING:
    from infra.orchestration.client import Outcome

trigger = typer.Typer(no_args_is_help=True, help="Start what is deployed, on a worker.")

Run = Annotated[str, typer.Argument(help="id of a flow run", metavar="RUN")]
By = Annotated[str, typer.Option("--by", help="who decides; kept with the model version")]
Reason = Annotated[str, typer.Option("--reason", help="kept with the model version")]


class RunIdError(InputError):
    """No id of a flow run."""


class SecretError(InputError):
    """No secret to check MLflow's signatures with."""


def deploy(
    notify: Annotated[
        str | None,
        typer.Option("--notify", help="Apprise address to tell of rejections and failures"),
    ] = None,
    prefect_yaml: Annotated[
        Path | None, typer.Option("--prefect-file", help="instead of the shipped prefect.yaml")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create work pool, queues, limits, deployments and automations, or bring them up to date."""
    with errors(as_json):
        from infra.orchestration.deployments import PREFECT_YAML
        from infra.orchestration.deployments import deploy as create
        from infra.orchestration.services import connected

        with connected(home()) as url:
            made = create(notify, prefect_yaml or PREFECT_YAML)
        if as_json:
            print_json({"prefect_api_url": url, "made": made})
        else:
            print("\n".join([f"on {url}", *made]))


@trigger.callback()
def _trigger() -> None:
    """Start what is deployed, on a worker."""


Recipe = Annotated[str, typer.Option("--recipe", help="a shipped one, or the worker's file")]
Timeout = Annotated[float | None, typer.Option("--timeout", min=0, help="seconds to wait at most")]
Key = Annotated[
    str | None,
    typer.Option("--idempotency-key", help="with the same key again: the same run, no other"),
]


@trigger.command("release")
def trigger_release(
    recipe: Recipe,
    settings: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait", help="until it ends or needs approval")] = False,
    timeout: Timeout = None,
    key: Key = None,
    queue: Annotated[
        str | None, typer.Option("--queue", help="of the work pool: cpu, gpu, gaudi")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start a release. With --wait: 0 promoted, 2 not promoted, 3 waiting for approval, 4 still
    running at the time limit, 1 error. Without: 0 once it is started."""
    with errors(as_json):
        parameters = {"recipe": recipe, "settings": settings or []}
        _start("release/release", parameters, key, queue, wait, timeout, as_json)


@trigger.command("benchmark")
def trigger_benchmark(
    recipe: Recipe,
    device: Annotated[DeviceKind, typer.Option("--device", help="whose queue it goes to")] = "cpu",
    shape: Annotated[
        str | None, typer.Option("--shape", help="random weights, see dpq bench")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="native checkpoint, the worker's folder")
    ] = None,
    settings: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait", help="until it ends")] = False,
    timeout: Timeout = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Start a benchmark on a worker that has the device. With --wait: 0 done, 4 still running at
    the time limit, 1 error. Without: 0 once it is started."""
    with errors(as_json):
        from infra.orchestration.deployments import QUEUE_OF

        parameters: dict[str, Any] = {"recipe": recipe, "settings": settings or []}
        parameters |= {"device": device, "shape": shape, "checkpoint": checkpoint}
        queue = QUEUE_OF[device]
        _start("benchmark/benchmark", parameters, key, queue, wait, timeout, as_json)


def _start(
    deployment: str,
    parameters: dict[str, Any],
    key: str | None,
    queue: str | None,
    wait: bool,
    timeout: float | None,
    as_json: bool,
) -> NoReturn:
    """Launch it, wait if asked to, show what came of it, and end the command."""
    from infra.orchestration import client
    from infra.orchestration.services import connected

    with connected(home()):
        run = client.launch(deployment, parameters, key, queue)
        outcome = client.wait(run, timeout) if wait else client.outcome(run)
    _show(outcome, as_json)
    raise typer.Exit(outcome.exit_code if wait else 0)


def approve(run: Run, by: By, reason: Reason, as_json: AsJson = False) -> None:
    """Let a release that waits for approval become champion."""
    _answer(run, True, by, reason, as_json)


def reject(run: Run, by: By, reason: Reason, as_json: AsJson = False) -> None:
    """Reject a release that waits for approval."""
    _answer(run, False, by, reason, as_json)


def _answer(run: str, approve: bool, by: str, reason: str, as_json: bool) -> None:
    with errors(as_json):
        try:
            name = UUID(run)
        except ValueError as error:
            raise RunIdError(
                f"{run!r} is no id of a flow run: its page and --json say it"
            ) from error
        if not by.strip() or not reason.strip():
            raise RunIdError("--by and --reason must say something: they are kept with the version")
        from infra.orchestration.client import answer
        from infra.orchestration.services import connected

        with connected(home()):
            answer(name, approve, by, reason)
        said = "approved" if approve else "rejected"
        if as_json:
            print_json({"run": run, "answer": said, "by": by, "reason": reason})
        else:
            print(f"{run}: {said}")


def webhook(
    host: Annotated[str, typer.Option("--host", help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8765,
) -> None:
    """Launch a release for each new version in MLflow's registry that has the tag dpq.recipe.

    Takes MLflow's webhooks for model_version.created at /mlflow; DPQ_WEBHOOK_SECRET is theirs."""
    with errors(False):
        secret = os.environ.get("DPQ_WEBHOOK_SECRET")
        if not secret:
            raise SecretError("DPQ_WEBHOOK_SECRET is not set: it is the secret of MLflow's webhook")
        import uvicorn

        from infra.orchestration.services import connected
        from infra.orchestration.webhook import application

        with connected(home()):
            uvicorn.run(application(secret), host=host, port=port, log_level="info")


def _show(outcome: "Outcome", as_json: bool) -> None:
    if as_json:
        print_json(outcome.as_dict())
        return
    print(f"{outcome.verdict}: run {outcome.run}")
    for reason in outcome.reasons:
        print(f"  {reason}")
    for key, value in outcome.made.items():
        print(f"{key} {value}")
    if outcome.verdict == "waiting":
        print(f"answer with dpq approve|reject {outcome.run} --by NAME --reason WHY")
