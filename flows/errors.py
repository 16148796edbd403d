"""How a command ends: one JSON object on stdout, one line on stderr, an exit code."""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from dpq_core.errors import InputError
from infra.settings import home


def print_json(content: dict[str, Any]) -> None:
    """One object on stdout; numbers that are not finite are no JSON."""
    print(json.dumps(content, allow_nan=False))


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """One line on stderr and exit code 1 for any error; the traceback goes to a log file."""
    try:
        yield
    except (typer.Exit, KeyboardInterrupt):
        raise
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, InputError):
            log = home() / "logs" / "dpq.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                traceback.print_exc(file=file)
            message = f"{message} (traceback in {log})"
        print(f"error: {message}", file=sys.stderr)
        if as_json:
            print_json({"verdict": "error", "reasons": [message]})
        raise typer.Exit(1) from None
