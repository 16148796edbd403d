"""`dpq …` as a process that has its imports already: forked from one that has done nothing else.
They take nine seconds of a core; what a process does from `main` on is the same, and so are its
signals, its children and its end.
"""

import atexit
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

import dask
import distributed

DPQ = "from flows.cli.main import main; main()"


class Forked:
    """One such process, with what tests use of Popen's interface."""

    def __init__(self, *arguments: object, program: str = DPQ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dpq-forked-"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        given = (program, [*map(str, arguments)], environment, self._folder)
        self._process = _context().Process(target=_run, args=given)
        self._process.start()
        self._printed: tuple[str, str] | None = None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, once it has ended."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("dpq", timeout or 0)
        if self._printed is None:
            files = (self._folder / "stdout", self._folder / "stderr")
            self._printed = tuple(file.read_text() if file.exists() else "" for file in files)
            shutil.rmtree(self._folder)
        return self._printed


@contextmanager
def dask_cluster(**options: object) -> Iterator[distributed.LocalCluster]:
    """Workers of Dask that have their imports already."""
    _context()
    options |= {"threads_per_worker": 1, "dashboard_address": None}
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        distributed.LocalCluster(**options) as cluster,
    ):
        yield cluster


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked_imports"])
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), *sys.path)))
    with mock.patch.dict(os.environ, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def _run(program: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        file = os.open(folder / name, os.O_CREAT | os.O_WRONLY, 0o600)
        os.dup2(file, stream.fileno())
        os.close(file)
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    sys.argv = ["-c", *arguments]
    try:
        exec(program, {"__name__": "__main__"})
    finally:  # as at any Python's end; multiprocessing's processes do the first alone
        threading._shutdown()
        atexit._run_exitfuncs()
