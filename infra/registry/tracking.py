"""MLflow tracking by explicit run id: no active run, so threads and nested runs cannot mix.

MLflow is imported on first use, and made quiet before that: it takes two seconds to import, reports
home as it does so, and writes migration logs and run addresses where the CLI's own output goes.
"""

import csv
import io
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from infra.errors import one_line
from infra.probes import ProbeError, check_mlflow, not_mlflow
from infra.settings import mlflow_page
from infra.store.owners import PROCESS, Owner

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's own limits: of one batch request, of a value, of a key. It truncates what is too long by
# itself, but with a warning a value.
_BATCH = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_KEY_LENGTH = 250

# `//user:password@host`, where a password may hold slashes and a port is none. Of a database a name
# alone is no secret.
_PASSWORD = re.compile(r"://[^\s@/:]*:(?!\d+(?:/|$))[^\s@]*@|^https?://[^/\s]*@")

PARENT = "mlflow.parentRunId"  # tag that nests a run


class TrackingError(RuntimeError):
    """A tracking address that is not to be used, with the way out."""


_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def is_server(address: str) -> bool:
    """Whether an address is a web server's, and not that of a store that we read ourselves."""
    return address.startswith(("http://", "https://"))


def mlflow_client(tracking_uri: str) -> "MlflowClient":
    """Client of one tracking server or store, for runs and registry alike, that says nothing.

    What the user has set in the environment (`MLFLOW_DISABLE_TELEMETRY=false`, say) stays.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.telemetry import set_telemetry_client

    set_telemetry_client()  # again: somebody may have imported mlflow before us
    for name in ("mlflow", "alembic"):
        logger = logging.getLogger(name)
        logger.setLevel(max(logging.WARNING, logger.level))
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def tracking_store(root: Path) -> tuple[str, Path | None]:
    """Tracking URI and artifact folder: the environment's, or SQLite under `root`, ready to use.

    The first use migrates for seconds and would race with another process's. The folder is for
    `tracked_run`; None leaves artifacts to the server that `MLFLOW_TRACKING_URI` names.

    Raises:
        TrackingError: the address has a password in it; addresses are shown and stored.
        ProbeError: MLflow does not answer there.
    """
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        _check_no_password(named)
        _check_answers(named)
        return named, None
    home = root.resolve() / "mlflow"
    uri, artifact_root = f"sqlite:///{home / 'mlflow.db'}", home / "artifacts"
    artifact_root.mkdir(parents=True, exist_ok=True)
    ready = home / "ready"  # by which version of MLflow
    with FileLock(home / "store.lock"):
        if not ready.is_file() or ready.read_text("utf-8") != version("mlflow"):
            mlflow_client(uri).search_experiments(max_results=1)
            ready.write_text(version("mlflow"), "utf-8")
    return uri, artifact_root


class TrackedRun:
    """One run. Every method writes at once; none depends on which thread calls it."""

    def __init__(self, client: "MlflowClient", run_id: str, url: str) -> None:
        self.run_id = run_id
        self.url = url
        self._client = client

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log values under dotted keys: `{"scheme": {"bits": 4}}` becomes `scheme.bits`."""
        from mlflow.entities import Param

        entries = [
            Param(_key(key), _text(value)[:_PARAM_LENGTH]) for key, value in _flatten(params)
        ]
        for batch in _batches(entries):
            self._client.log_batch(self.run_id, params=batch)

    def log_metrics(self, metrics: Mapping[str, float | None]) -> None:
        """Log finite values as metrics, and any other as the tag `nonfinite.<name>`.

        MLflow stores NaN as 0 and infinity as the largest double; as a tag the value survives.
        """
        from mlflow.entities import Metric

        finite = {k: float(v) for k, v in metrics.items() if v is not None and math.isfinite(v)}
        now = int(time.time() * 1000)
        entries = [Metric(_key(key), value, now, 0) for key, value in finite.items()]
        for batch in _batches(entries):
            self._client.log_batch(self.run_id, metrics=batch)
        self.set_tags({f"nonfinite.{k}": str(v) for k, v in metrics.items() if k not in finite})

    def log_table(self, rows: Sequence[Mapping[str, object]], path: str) -> None:
        """Log rows twice: `<path>.json`, which MLflow's pages show as a table, and `<path>.csv`.

        Columns are the keys in order of appearance; a row without one has an empty cell. A suffix
        of `path` is replaced. One table a path and run: MLflow appends to a table that exists.
        """
        columns = list(dict.fromkeys(key for row in rows for key in row))
        stem = path.removesuffix(".json").removesuffix(".csv")
        table = {column: [row.get(column) for row in rows] for column in columns}
        self._client.log_table(self.run_id, table, f"{stem}.json")
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.log_text(text.getvalue(), f"{stem}.csv")

    def log_figure(self, figure: Any, path: str) -> None:
        """Log a matplotlib figure; the suffix of `path` chooses the format."""
        self._client.log_figure(self.run_id, figure, path)

    def log_file(self, path: Path) -> None:
        """Log a file under its own name."""
        self._client.log_artifact(self.run_id, str(path))

    def artifact_uri(self, path: str) -> str:
        """Where a logged file is: what a browser or MLflow's tools open."""
        return f"{self._client.get_run(self.run_id).info.artifact_uri}/{path}"

    def link(self, path: str, server: str | None = None) -> str:
        """Where a browser shows a logged file: the server's page of it, or the file itself.

        server: address of one that shows a store of files.
        """
        if is_server(self.url):
            return f"{self.url}/artifacts/{path}"
        if server is None:
            return self.artifact_uri(path)
        experiment = self._client.get_run(self.run_id).info.experiment_id
        return f"{server}/#/experiments/{experiment}/runs/{self.run_id}/artifacts/{path}"

    def log_text(self, text: str, path: str) -> None:
        """Log text as the artifact `path`."""
        self._client.log_text(self.run_id, text, path)

    def log_dict(self, content: Mapping[str, Any], path: str) -> None:
        """Log a mapping as JSON or YAML, by the suffix of `path`."""
        self._client.log_dict(self.run_id, dict(content), path)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, replacing those of the same name."""
        from mlflow.entities import RunTag

        entries = [RunTag(_key(key), str(value)[:_TAG_LENGTH]) for key, value in tags.items()]
        for batch in _batches(entries):
            self._client.log_batch(self.run_id, tags=batch)


@contextmanager
def tracked_run(
    tracking_uri: str,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    artifact_root: Path | None,
) -> Iterator[TrackedRun]:
    """A run that ends FINISHED, FAILED when an error passes through, KILLED when the process is
    told to stop. Its tag `dpq.process` says whose it is: `infra.orchestration.dead_runs` looks
    after the rest.

    `artifact_root` is where the experiment's runs keep their files; it counts only when this call
    creates the experiment, and None leaves the choice to the tracking server.
    """
    client = mlflow_client(tracking_uri)
    experiment_id = _experiment_id(client, experiment, artifact_root)
    process = {PROCESS: str(Owner.new())}
    run_id = client.create_run(experiment_id, run_name=name, tags=process).info.run_id
    if is_server(tracking_uri):
        page = (mlflow_page() or tracking_uri).rstrip("/")
        url = f"{page}/#/experiments/{experiment_id}/runs/{run_id}"
    else:
        url = f"runs:/{run_id}"
    run = TrackedRun(client, run_id, url)
    try:
        run.set_tags(tags)
        yield run
    except (Exception, SystemExit):
        client.set_terminated(run_id, "FAILED")
        raise
    except BaseException:  # Ctrl-C, and what Prefect makes of SIGTERM
        client.set_terminated(run_id, "KILLED")
        raise
    client.set_terminated(run_id, "FINISHED")


@cache
def _check_answers(uri: str) -> None:
    """Once in a process: later MLflow's client waits for a server that is started again."""
    check_mlflow(uri)
    try:
        mlflow_client(uri).search_experiments(max_results=1)
    except Exception as error:  # of MLflow, SQLAlchemy, a driver that is not installed
        said = one_line(error, 300)
        reason = f"it does not serve us ({said})"
        hint = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD say who asks"
        raise ProbeError(f"{not_mlflow(uri, reason)}; {hint}") from error


def _check_no_password(uri: str) -> None:
    if _PASSWORD.search(uri):
        raise TrackingError(
            "MLFLOW_TRACKING_URI has a password or token in it, and addresses are shown in pages"
            " and logs: leave it out, and set MLFLOW_TRACKING_USERNAME and"
            " MLFLOW_TRACKING_PASSWORD (a server), or ~/.pgpass (PostgreSQL)"
        )


def _experiment_id(client: "MlflowClient", name: str, artifact_root: Path | None) -> str:
    """Id of the experiment, created where it is missing; whoever creates it first wins."""
    from mlflow.exceptions import MlflowException

    if existing := client.get_experiment_by_name(name):
        if existing.lifecycle_stage == "deleted":
            raise TrackingError(
                f"the experiment {name!r} was deleted in MLflow, which keeps its name: restore it"
                f" (mlflow experiments restore -x {existing.experiment_id}), or set"
                " registry.experiment to another"
            )
        return str(existing.experiment_id)
    location = artifact_root.resolve().as_uri() if artifact_root else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.get_experiment_by_name(name).experiment_id)


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    """A parameter's value; containers as JSON, so that a reader can take them apart again."""
    return json.dumps(value, default=str) if isinstance(value, list | tuple | dict) else str(value)


def _key(name: str) -> str:
    """`name` as MLflow accepts it: lm-eval's `acc,none` becomes `acc_none`."""
    return re.sub(r"[^\w.\-/ :]", "_", name)[:_KEY_LENGTH]


def _batches(entries: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(entries)
    while batch := list(islice(rest, _BATCH)):
        yield batch
