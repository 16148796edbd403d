"""How a command ends: one JSON object on stdout, one line on stderr, an exit code."""

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer
from pydantic import ValidationError

from dpq_core.errors import InputError, one_line
from flows.cli.results import printing_to_stderr
from flows.cli.signals import Ended
from infra.settings import home
from infra.store.disk import is_full, space_left

if TYPE_CHECKING:
    import httpx


_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


def print_json(content: dict[str, Any]) -> None:
    """One object on stdout; numbers that are not finite are no JSON."""
    print(json.dumps(content, allow_nan=False), file=_results.get(), flush=True)


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """One line on stderr and an exit code for any error: 1, or 130 and 143 for a process that was
    told to stop. The traceback goes to a log file. as_json: stdout is for `print_json` alone."""
    with ExitStack() as stack:
        if as_json:
            stdout = stack.enter_context(printing_to_stderr())
            stack.callback(_results.reset, _results.set(stdout))
        with _errors(as_json):
            yield


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    try:
        _check_home_folder()
        yield
        return
    except typer.Exit:
        raise
    except Ended as end:
        message = f"{end}: what is finished is kept, and the same command goes on from there"
        code = end.exit_code
    except InputError as error:
        message, code = one_line(error), 1
    except Exception as error:
        message, code = f"{_explained(error)}{_logged()}", 1
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print_json({"verdict": "error", "reasons": [message]})
    raise typer.Exit(code)


class HomeFolderError(InputError):
    """No folder for what Prefect, MLflow and the hub keep for a user."""


def _check_home_folder() -> None:
    try:
        Path.home()
    except RuntimeError as error:
        raise HomeFolderError(
            f"HOME is not set, and this machine knows no user {os.getuid()}: set HOME to a folder"
            " that can be written, for what Prefect, MLflow and the hub keep there"
        ) from error


def _explained(error: Exception) -> str:
    """What an error says, and of a full disk or a service that is gone where that is: libraries
    leave it out."""
    import httpx  # both are imported late, for commands that end well

    from infra.store import StoreFullError

    if isinstance(error, httpx.TransportError):
        return f"{_server_of(error)} does not answer ({one_line(error)}): {_AGAIN}"
    if _passed_through(error, "prefect.settings"):
        return f"Prefect's settings cannot be read: {_setting_in(error)}"
    if not is_full(error) or isinstance(error, StoreFullError):
        return _of_a_file(error) if isinstance(error, OSError) else one_line(error)
    return (
        f"no space left: {space_left(home())} in {home()}, {space_left(Path.cwd())} here: make room"
        f" and run again, what is finished is kept: {one_line(error, 300)}"
    )


def _passed_through(error: Exception, package: str) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith(package) for frame, _ in frames)


def _setting_in(error: Exception) -> str:
    """What is wrong with a variable or a profile of Prefect's."""
    way_out = "mend the variable PREFECT_… or the profile (prefect config view) that has it"
    if not isinstance(error, ValidationError):
        return f"{one_line(error)}: {way_out}"
    first = error.errors()[0]
    where = ".".join([error.title, *map(str, first["loc"])])
    return f"{where}: {first['msg']} (got {first['input']!r}): {way_out}"


def _of_a_file(error: OSError) -> str:
    """The file first; where it is one of ours, how to have them elsewhere."""
    if not isinstance(error.filename, str | Path) or not error.strerror:
        return one_line(error)
    said = f"{error.filename}: {error.strerror}"
    if not Path(error.filename).absolute().is_relative_to(home().absolute()):
        return said
    return f"{said}: set DPQ_HOME to a folder that can be written (it is {home()})"


_AGAIN = "run again (a server of ours is started anew): what is finished is kept"


def _server_of(error: "httpx.TransportError") -> str:
    try:
        url = error.request.url
    except RuntimeError:  # of no request
        return "a service"
    return f"{url.scheme}://{url.netloc.decode()}"


def _logged() -> str:
    """Write the traceback to the log, and say where; nothing where there is no room for it."""
    log = home() / "logs" / "dpq.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            traceback.print_exc(file=file)
    except OSError as error:
        return f" (no traceback: {log}: {error.strerror})"
    return f" (traceback in {log})"
