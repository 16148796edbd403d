"""A team's services for the chaos test, which are restarted when they are killed: PostgreSQL, the
Prefect server that is on it, and an S3 endpoint that holds the model and takes the release."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from dpq_core.model.reader import SIDE_FILES
from infra import remote

_UP = 120.0  # s, for a service to come up
_PAUSE = 1.0  # s that a supervisor waits before it restarts one
_DOWN = 5.0  # s that the S3 endpoint stays away
_ACCOUNT = "nobody"  # PostgreSQL refuses to run as root


def postgres_binaries() -> Path | None:
    """Folder of `postgres` and `initdb`; None: not installed."""
    found = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))]
    named = shutil.which("initdb")
    return found[-1] if found else Path(named).parent if named else None


class Supervised:
    """A process that is started again whenever it ends."""

    def __init__(
        self, command: list[str], healthy: Callable[[], bool], log: Path, **process: Any
    ) -> None:
        self._command, self._healthy, self._log, self._process = command, healthy, log, process
        self._stopping = threading.Event()
        self._start()
        self.await_health()
        self._watch = threading.Thread(target=self._restart, daemon=True)
        self._watch.start()

    def kill(self) -> None:
        """SIGKILL, with what it started, as the kernel does to a container out of memory."""
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._running.pid).children(recursive=True)
            self._running.kill()
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10)

    def stop(self) -> None:
        self._stopping.set()
        self.kill()
        self._watch.join()
        self.kill()

    def await_health(self) -> None:
        deadline = time.monotonic() + _UP
        while not self._healthy():
            assert time.monotonic() < deadline, (
                f"{self._command[0]}: {self._log.read_text()[-2000:]}"
            )
            time.sleep(0.2)

    def _start(self) -> None:
        with self._log.open("ab") as output:
            self._running = subprocess.Popen(
                self._command, stdout=output, stderr=output, **self._process
            )

    def _restart(self) -> None:
        while not self._stopping.is_set():
            self._running.wait()
            if not self._stopping.wait(_PAUSE):
                self._start()


@contextmanager
def postgres(folder: Path) -> Iterator[tuple[Supervised, int]]:
    """A cluster of its own, and its port."""
    binaries, port = postgres_binaries(), free_port()
    assert binaries is not None, "PostgreSQL is not installed: apt-get install postgresql"
    account = _ACCOUNT if os.geteuid() == 0 else None
    if account:
        shutil.chown(folder, account)
    data = folder / "data"
    initdb = [binaries / "initdb", "-D", data, "-U", "dpq", "--auth=trust", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True, user=account)
    command = [binaries / "postgres", "-D", data, "-p", port, "-k", folder, "-h", "127.0.0.1"]
    command += ["-c", "fsync=off"]  # processes are killed, not the machine
    ready = [binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port), "-U", "dpq"]

    def healthy() -> bool:
        return subprocess.run(ready).returncode == 0

    service = Supervised(list(map(str, command)), healthy, folder.parent / "pg.log", user=account)
    try:
        yield service, port
    finally:
        service.stop()


@contextmanager
def prefect_server(folder: Path, database: int) -> Iterator[tuple[Supervised, str]]:
    """A Prefect server on PostgreSQL, and the address of its API."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_DATABASE_CONNECTION_URL": (
            f"postgresql+asyncpg://dpq@127.0.0.1:{database}/postgres"
        ),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start"]
    command += ["--host", "127.0.0.1", "--port", str(port)]

    def healthy() -> bool:
        with suppress(httpx.HTTPError), httpx.Client(trust_env=False, timeout=5) as client:
            return client.get(f"{url}/ready").is_success
        return False

    service = Supervised(command, healthy, folder / "server.log", env=environment)
    try:
        yield service, url
    finally:
        service.stop()


@contextmanager
def s3_endpoint() -> Iterator[Any]:
    """An endpoint whose content outlives its absences; the environment names it."""
    import s3fs
    from s3_server import FaultyS3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = FaultyS3()
    named = {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "chaos",
        "AWS_SECRET_ACCESS_KEY": "chaos",
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in named}
    os.environ.update(named)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        s3fs.S3FileSystem().makedirs("chaos", exist_ok=True)
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


@contextmanager
def team(model: Path) -> Iterator[tuple[dict[str, str], dict[str, list[Callable[[], None]]], Any]]:
    """Environment of a run, what can be killed, and a recipe's sections."""
    with (
        tempfile.TemporaryDirectory() as name,
        postgres(_folder(name, "postgres")) as (database, port),
        prefect_server(_folder(name, "prefect"), port) as (server, url),
        s3_endpoint() as s3,
    ):
        Path(name).chmod(0o755)
        names = [each.name for each in model.iterdir() if each.suffix == ".safetensors"]
        names += [each for each in SIDE_FILES if (model / each).is_file()]
        remote.upload(model, "s3://chaos/model", names)

        def s3_goes_down() -> None:
            if not s3.is_down:
                s3.down(_DOWN)

        services = {
            "postgres": [database.kill],
            "server": [server.kill],
            "s3": [s3_goes_down],
        }
        sections = {
            "model": "s3://chaos/model",
            "registry": {"name": "chaos", "destination": "s3://chaos/releases"},
        }
        yield {"PREFECT_API_URL": url}, services, sections


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _folder(parent: str, name: str) -> Path:
    Path(parent).chmod(0o755)  # for PostgreSQL's account
    folder = Path(parent) / name
    folder.mkdir()
    return folder
