"""A server process that all processes under one root share: first user starts, last user stops.

    <root>/<name>/lock, server.json, users/<pid>-<thread>      <root>/logs/<name>-server.log

Each user holds a file lock on its file in `users/`: the kernel lets go of the lock when a process
dies, however it dies, so nobody trusts a pid that may since have been given to somebody else. A
server that a killed process left behind is taken over by the next user; if none comes for a while,
it is stopped by the process that watches each server (`infra.orchestration.server_watch`), which
also starts one again that dies while it has users.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil
from filelock import FileLock, Timeout

HOST = "127.0.0.1"
_START_TIMEOUT = 120.0  # s; the first start migrates a database, and takes 15 s of two busy cores
_ADOPT_TIMEOUT = 20.0  # s; a server that somebody left, perhaps in the middle of its start
_STOP_TIMEOUT = 15.0  # s, before SIGKILL
_FORSAKEN = 30.0  # s without a living user, before a server is stopped
_RESTARTS = 3  # of a server that dies again before it was up for as long
_WATCH = 1.0  # s between two looks at the users
_UNNAMED = 1.0  # s that a process may have no arguments


class ServiceError(RuntimeError):
    """A service that does not come up, with its log file and the last line in it."""


class _EndedError(ServiceError):
    """Its process has ended."""


@dataclass(frozen=True)
class ServerKind:
    """A server that we know how to run."""

    name: str
    preferred_port: int
    health: str
    launch: Callable[[Path, int], tuple[list[str], dict[str, str]]]  # command, environment
    settle: Callable[[str], None]  # called with the address before the server is stopped


@dataclass(frozen=True)
class _Server:
    """A server process that may outlive whoever started it."""

    pid: int
    port: int
    command: list[str]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def family(self) -> list[psutil.Process]:
        """The process and its children; empty when it has ended, or its pid is another's now."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if _command(process)[1:] == self.command[1:]:
                return [process, *process.children(recursive=True)]
        return []

    def healthy(self, path: str) -> bool:
        """Whether it answers, and not some other server that took the port before it."""
        try:
            # No proxy to ourselves, and no certificates: to read them takes 50 ms of a core.
            with httpx.Client(trust_env=False, verify=False, timeout=5) as client:
                answers = client.get(self.url + path).is_success
            return answers and any(_listens(process, self.port) for process in self.family())
        except (httpx.HTTPError, psutil.Error):
            return False

    def stop(self) -> None:
        """SIGTERM, wait, and SIGKILL for what is left."""
        family = self.family()
        for process in family:
            with suppress(psutil.Error):
                process.terminate()
        _, left = psutil.wait_procs(family, timeout=_STOP_TIMEOUT)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=_STOP_TIMEOUT)


@contextmanager
def shared_server(kind: ServerKind, root: Path) -> Iterator[str]:
    """The address of a server of this kind, which the last user under `root` stops."""
    home = root / kind.name
    (home / "users").mkdir(parents=True, exist_ok=True)
    # Two threads of a process are two users, as flock sees them.
    name = f"{os.getpid()}-{threading.get_ident()}"
    user = FileLock(home / "users" / name, thread_local=False)
    with _exclusive(home):
        server = _running(kind, home) or _start(kind, root)
        user.acquire(timeout=0)
    try:
        yield server.url
    finally:
        with _exclusive(home):
            user.release()
            Path(user.lock_file).unlink(missing_ok=True)
            if not _users(home) and (last := _load(home)):
                try:
                    kind.settle(last.url)
                finally:
                    last.stop()
                    (home / "server.json").unlink(missing_ok=True)


def address_of(kind: ServerKind, root: Path) -> str | None:
    """Where a server of this kind answers that somebody has started; None: there is none."""
    server = _load(root / kind.name)
    return server.url if server and server.healthy(kind.health) else None


def watch(home: Path, pid: int, patience: float) -> None:
    """Look after a server until it has ended or is another's: start it again, in this process's
    environment, when it dies while somebody uses it (clients try again for a minute), and stop it
    after `patience` seconds without a living user.

    Nobody else starts, takes over or stops a server meanwhile; a user that comes later starts
    another.
    """
    forsaken: float | None = None
    begun, deaths = time.monotonic(), 0
    while (server := _load(home)) and server.pid == pid:
        time.sleep(min(_WATCH, patience / 4))
        try:
            with FileLock(home / "lock", timeout=0):
                if _load(home) != server:
                    return
                users, lives = _users(home), bool(server.family())
                if not lives:
                    deaths = 1 if time.monotonic() - begun > patience else deaths + 1
                    if not users or deaths > _RESTARTS:
                        return
                    begun, pid = time.monotonic(), _start_again(server, home)
                elif users:
                    forsaken = None
                else:
                    forsaken = forsaken or time.monotonic()
                    if time.monotonic() - forsaken > patience:
                        server.stop()
                        (home / "server.json").unlink(missing_ok=True)
        except Timeout:  # somebody is about to be a user, or to stop it
            forsaken = None


@contextmanager
def _exclusive(home: Path) -> Iterator[None]:
    """Held while somebody starts, takes over, or stops a server."""
    lock = FileLock(home / "lock", timeout=_START_TIMEOUT + _ADOPT_TIMEOUT + 2 * _STOP_TIMEOUT)
    try:
        lock.acquire()
    except Timeout as error:
        raise ServiceError(f"{lock.lock_file}: held by another process for too long") from error
    try:
        yield
    finally:
        lock.release()


def _users(home: Path) -> int:
    """How many processes use the server; files of dead ones are removed."""
    living = 0
    for path in (home / "users").iterdir():
        try:
            with FileLock(path, timeout=0):
                path.unlink()
        except Timeout:
            living += 1
    return living


def _load(home: Path) -> _Server | None:
    try:
        return _Server(**json.loads((home / "server.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _save(server: _Server, home: Path) -> None:
    new = home / "server.json.new"  # renamed: others read at any time
    new.write_text(json.dumps(asdict(server)), "utf-8")
    new.replace(home / "server.json")


def _running(kind: ServerKind, home: Path) -> _Server | None:
    """The server that is there already; one that does not answer is stopped."""
    server = _load(home)
    deadline = time.monotonic() + _ADOPT_TIMEOUT
    while server and server.family() and time.monotonic() < deadline:
        if server.healthy(kind.health):
            return server
        time.sleep(0.2)
    if server:
        server.stop()
    return None


def _start(kind: ServerKind, root: Path) -> _Server:
    """Start a server on its usual port, or on a free one where that is taken.

    The port of a server that died is asked for first: others may still be talking to it.
    """
    before = _load(root / kind.name)
    preferred = before.port if before else kind.preferred_port
    try:
        return _start_on(_free_port(preferred), kind, root)
    except _EndedError:  # somebody may have been faster, and may be gone already
        return _start_on(_free_port(0), kind, root)


def _start_on(port: int, kind: ServerKind, root: Path) -> _Server:
    home, log = root / kind.name, root / "logs" / f"{kind.name}-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command, environment = kind.launch(home, port)
    with log.open("ab") as output:
        process = _launched(command, environment, home, output)
    server = _Server(process.pid, port, command)
    # Before it is up: should we be killed now, the next user finds it.
    _save(server, home)
    _watch(server, home, log, environment)
    try:
        _await_health(server, kind, process, log)
    except BaseException:
        server.stop()
        (home / "server.json").unlink(missing_ok=True)
        raise
    return server


def _start_again(dead: _Server, home: Path) -> int:
    """Its pid, before it is up; what it prints goes where this process prints."""
    process = _launched(dead.command, dict(os.environ), home, None)
    _save(_Server(process.pid, dead.port, dead.command), home)
    return process.pid


def _launched(
    command: list[str], environment: dict[str, str], home: Path, output: IO[bytes] | None
) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for us; the server goes when the flow is done
    )
    _await_end(process)
    return process


def _watch(server: _Server, home: Path, log: Path, environment: dict[str, str]) -> None:
    arguments = [str(home), str(server.pid), str(_FORSAKEN)]
    path = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    with log.open("ab") as output:
        watch = subprocess.Popen(
            [sys.executable, "-m", "infra.orchestration.server_watch", *arguments],
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # as the server
        )
    _await_end(watch)


def _await_end(process: "subprocess.Popen[bytes]") -> None:
    """Collect the exit status whenever it comes: no zombie, no warning about a child left."""
    threading.Thread(target=process.wait, daemon=True).start()


def _await_health(
    server: _Server, kind: ServerKind, process: "subprocess.Popen[bytes]", log: Path
) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while not server.healthy(kind.health):
        error = ServiceError
        if process.poll() is not None:
            problem = f"ended with code {process.returncode} while starting"
            error = _EndedError
        elif time.monotonic() > deadline:
            problem = f"did not answer within {_START_TIMEOUT:.0f} s"
        else:
            time.sleep(0.1)
            continue
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        said = lines[-1].strip() if lines else "it is empty"
        raise error(f"the {kind.name} server {problem}; {log}: {said}")


def _command(process: psutil.Process) -> list[str]:
    """Its arguments; of one that has just been started the kernel has none for a moment, and of a
    zombie never any."""
    deadline, found = time.monotonic() + _UNNAMED, list[str]()
    while not (found := process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:  # a thread of the kernel
            break
        time.sleep(0.01)
    return found


def _listens(process: psutil.Process, port: int) -> bool:
    connections = process.net_connections(kind="tcp")
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def _free_port(preferred: int) -> int:
    """`preferred` if nobody listens there, else any other."""
    for port in (preferred, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    raise ServiceError(f"no free port on {HOST}")
