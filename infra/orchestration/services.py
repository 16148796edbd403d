"""The services a run needs, started where nobody runs them: a Prefect server, and MLflow on SQLite.

    .dpq/prefect/   home of the Prefect server: lock, server.json, users/<pid>, prefect.db
    .dpq/mlflow/    mlflow.db, artifacts/; the same three for the web server of `dpq ui`
    .dpq/logs/      what the servers printed

The Prefect server is a process of its own, not Prefect's "ephemeral" one, which loses task runs and
is slow to come up; all processes under one root share it (`shared_server`).
"""

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from prefect import context
from prefect.context import refresh_global_settings_context
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import get_current_settings, temporary_settings

from infra.orchestration.shared_server import (
    HOST,
    ServerKind,
    ServiceError,
    address_of,
    shared_server,
)
from infra.probes import check_prefect
from infra.registry.tracking import is_server, tracking_store

_FLUSH_TIMEOUT = 10.0  # s, for what this process still has to send, and again for the server


@dataclass(frozen=True)
class Services:
    """Addresses of what a run talks to."""

    prefect_api_url: str
    prefect_ui_url: str
    mlflow_tracking_uri: str
    artifact_root: Path | None = None  # of new experiments; None: the tracking server decides


@dataclass(frozen=True)
class UiAddresses:
    """Pages to open in a browser."""

    prefect: str
    mlflow: str


@contextmanager
def services(root: Path = Path(".dpq")) -> Iterator[Services]:
    """Prefect and MLflow for as long as the context lasts, started only where none is configured.

    `PREFECT_API_URL` (or the active Prefect profile) and `MLFLOW_TRACKING_URI` win over ours.
    Inside, Prefect's settings and `PREFECT_API_URL` name the server, so child processes find it
    too. Call it outside of a running event loop.

    Raises:
        ServiceError: a server did not come up.
        ProbeError: one that is configured does not answer.
    """
    root = root.resolve()
    with ExitStack() as stack:
        _check_configured(root)
        with ThreadPoolExecutor(1) as pool:  # first use costs both many seconds
            tracking = pool.submit(tracking_store, root)
            api_url = stack.enter_context(_prefect(root))
        uri, artifact_root = tracking.result()
        ui_url = get_current_settings().ui_url or api_url.removesuffix("/api")
        yield Services(api_url, ui_url, uri, artifact_root)


@contextmanager
def ui(root: Path = Path(".dpq")) -> Iterator[UiAddresses]:
    """Both web pages, for `dpq ui`: one more user of the Prefect server, and MLflow's own server.

    Raises:
        ServiceError: a server did not come up.
    """
    root = root.resolve()
    with services(root) as running:
        if is_server(running.mlflow_tracking_uri):
            yield UiAddresses(running.prefect_ui_url, running.mlflow_tracking_uri)
            return
        with shared_server(_mlflow(running.mlflow_tracking_uri), root) as url:
            yield UiAddresses(running.prefect_ui_url, url)


def mlflow_server(tracking_uri: str, root: Path = Path(".dpq")) -> str | None:
    """Address of MLflow's web server where a `dpq ui` under this root has it up."""
    return address_of(_mlflow(tracking_uri), root.resolve())


@contextmanager
def connected(root: Path = Path(".dpq")) -> Iterator[str]:
    """Prefect's settings for a server that is up, and its address: the configured one, or the one
    that a `dpq` under this root has started. None is started: it would end with this command.

    Raises:
        ServiceError: there is none.
        ProbeError: the configured one does not answer.
    """
    url = configured = _configured()
    if not url:
        server = address_of(_PREFECT, root.resolve())
        if server is None:
            raise ServiceError(
                f"no Prefect server: set PREFECT_API_URL, or leave `dpq ui` up (home: {root})"
            )
        url = f"{server}/api"
    with _prefect_settings({"PREFECT_API_URL": url}):
        if configured:
            check_prefect(url)
        yield url


def _check_configured(root: Path) -> None:
    """Check the services that the environment names, before a server is started.

    Raises:
        ProbeError: it does not answer.
    """
    url = _configured()
    with _prefect_settings({"PREFECT_API_URL": url} if url else {}):  # and no proxy for this host
        if url:
            check_prefect(url)
        if os.environ.get("MLFLOW_TRACKING_URI"):
            tracking_store(root)


def _configured() -> str | None:
    """Address of Prefect's API, by the environment or the active profile."""
    return os.environ.get("PREFECT_API_URL") or get_current_settings().api.url


@contextmanager
def _prefect(root: Path) -> Iterator[str]:
    if named := _configured():
        with _prefect_settings({"PREFECT_API_URL": named}):
            try:
                yield named
            finally:
                _send_pending()
        return
    with shared_server(_PREFECT, root) as url:
        # Results that a key of this server's cache names live and die with it.
        results = os.environ.get("PREFECT_LOCAL_STORAGE_PATH", str(root / "prefect" / "storage"))
        ours = {"PREFECT_API_URL": f"{url}/api", "PREFECT_LOCAL_STORAGE_PATH": results}
        with _prefect_settings(ours):
            try:
                yield f"{url}/api"
            finally:
                _send_pending()


@contextmanager
def _prefect_settings(settings: Mapping[str, str]) -> Iterator[None]:
    """Settings in this context, in threads that do not inherit it, and in child processes."""
    local = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""]
    if HOST not in local[0].split(","):
        local.append(HOST)
    no_proxy = ",".join(filter(None, local))
    changes = {**settings, "no_proxy": no_proxy, "NO_PROXY": no_proxy}
    changes["DO_NOT_TRACK"] = os.environ.get("DO_NOT_TRACK", "1")
    if changes.items() <= os.environ.items() and _known(settings.get("PREFECT_API_URL")):
        yield  # to read them again takes a tenth of a second, each way
        return
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        refresh_global_settings_context()
        with temporary_settings(dict(settings)):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        refresh_global_settings_context()


def _known(url: str | None) -> bool:
    """Whether this context has the address, and what threads have that do not inherit it."""
    every = get_current_settings(), context.GLOBAL_SETTINGS_CONTEXT.settings
    return all(each.api.url == url for each in every)


def _send_pending() -> None:
    """Hand over events (they carry the task runs) and log lines that wait in this process; for as
    long as a server that lives may take."""
    for worker in (EventsWorker, APILogWorker):
        logging.getLogger(worker.__name__).setLevel(logging.ERROR)  # "still processing items"
        worker.drain_all(timeout=_FLUSH_TIMEOUT)


def _settle_prefect(url: str) -> None:
    """Wait until the server has written the task runs of the events that it was sent.

    They pass through a queue in its memory, which a stop would empty, and into the database once a
    second: the counts have to stay the same for longer than that.
    """
    counts: list[tuple[int, int]] = []
    deadline = time.monotonic() + _FLUSH_TIMEOUT
    finished = {"task_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}}
    local = httpx.Client(trust_env=False, verify=False, timeout=5)
    with suppress(httpx.HTTPError), local as client:
        while time.monotonic() < deadline and (len(counts) < 5 or len(set(counts[-5:])) > 1):
            asked = [client.post(f"{url}/api/task_runs/count", json=f) for f in ({}, finished)]
            counts.append((asked[0].json(), asked[1].json()))
            time.sleep(0.3)


def _launch_prefect(home: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """A server on its own home and nobody's profile, whatever the user's clients are set to."""
    address = ["--host", HOST, "--port", str(port)]
    command = [sys.executable, "-m", "prefect", "server", "start", *address, "--analytics-off"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return command, inherited | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_API_URL": f"http://{HOST}:{port}/api",  # else the page asks port 4200
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
    }


_PREFECT = ServerKind("prefect", 4200, "/api/health", _launch_prefect, _settle_prefect)


def _mlflow(tracking_uri: str) -> ServerKind:
    """MLflow's web server on a store, for `dpq ui`: runs write to the store without it."""

    def launch(home: Path, port: int) -> tuple[list[str], dict[str, str]]:
        address = ["--host", HOST, "--port", str(port), "--workers", "1"]
        store = ["--backend-store-uri", tracking_uri]
        artifacts = ["--default-artifact-root", str(home / "artifacts")]
        command = [sys.executable, "-m", "mlflow", "server", *address, *store, *artifacts]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return command, {**os.environ, **quiet, "DO_NOT_TRACK": "true"}

    return ServerKind("mlflow", 5000, "/health", launch, settle=lambda url: None)
