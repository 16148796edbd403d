"""The `dpq` command.

Exit codes: 0 promoted (or done), 2 rejected, 1 error. With `--json`, stdout carries one object and
nothing else; progress and errors go to stderr.
"""

import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from dpq_core.errors import InputError
from dpq_core.recipe import Recipe, load_recipe
from infra.settings import home

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

RecipePath = Annotated[Path, typer.Argument(help="YAML file", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key.path=value, repeatable")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]

_Result = TypeVar("_Result")


@app.command()
def release(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Quantize, measure, gate and register: 0 promoted, 2 rejected, 1 error."""
    with _errors(as_json):
        parsed = load_recipe(recipe, overrides)
        result = _run(parsed, lambda: _flow("release")(parsed))
        if as_json:
            _print_json(result.as_dict())
        else:
            from flows.terminal import show_release

            show_release(result)
        if result.verdict.verdict == "rejected":
            raise typer.Exit(2)


@app.command()
def quantize(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Stop after the verified checkpoint."""
    with _errors(as_json):
        parsed = load_recipe(recipe, overrides)
        candidate = _run(parsed, lambda: _flow("quantize")(parsed))
        checkpoint, manifest = candidate.checkpoint, candidate.manifest
        errors = [row["error"] for row in manifest["layers"]]
        summary = {
            "checkpoint": str(checkpoint.folder),
            "sha256": checkpoint.sha256,
            "bytes_per_weight": manifest["bytes_per_weight"],
            "layer_error": sum(errors) / len(errors),
            "layers": len(errors),
            "skipped": manifest["skipped"],
        }
        if as_json:
            _print_json(summary)
        else:
            for name, value in summary.items():
                print(f"{name}: {value}")


@app.command()
def compare(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the ladder: a row a variant of the recipe's scheme."""
    with _errors(as_json):
        parsed = load_recipe(recipe, overrides)
        rows = _run(parsed, lambda: _flow("compare")(parsed))
        if as_json:
            _print_json({"rows": [dataclasses.asdict(row) for row in rows]})
        else:
            from flows.terminal import show_ladder

            show_ladder(rows)


@app.command()
def ui() -> None:
    """Leave the Prefect server and MLflow up, print their addresses, stop with Ctrl-C."""
    import threading

    from infra.services import ui as run_ui

    with _errors(as_json=False), run_ui(home()) as addresses:
        print(f"Prefect  {addresses.prefect}\nMLflow   {addresses.mlflow}\nCtrl-C stops both.")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would leave servers behind
            print("stopping …")


def main() -> None:
    """Console script."""
    os.environ.setdefault("DO_NOT_TRACK", "1")  # before Prefect is imported
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is shown by flows.terminal
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


def _flow(name: str) -> Callable[[Recipe], Any]:
    """A flow with the runner of its recipe. Imported late: Prefect takes seconds to import, and a
    bad recipe should not have to wait for it."""
    import importlib

    flow = getattr(importlib.import_module(f"flows.{name}"), name)

    def run(recipe: Recipe) -> Any:
        from flows.quantize import task_runner

        return flow.with_options(task_runner=task_runner(recipe.execution))(recipe)

    return run


def _run(recipe: Recipe, run: Callable[[], _Result]) -> _Result:
    from infra.services import services

    with services(home()):
        from flows.terminal import progress

        with progress():
            return run()


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, allow_nan=False))


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
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
            _print_json({"verdict": "error", "reasons": [message]})
        raise typer.Exit(1) from None
