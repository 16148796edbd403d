"""The `dpq` command.

Exit codes: 0 promoted (or done), 2 not promoted (rejected, inspected, withheld), 1 error, 130 ended
by Ctrl-C, 143 by SIGTERM. With `--json`, stdout carries one object and nothing else; progress and
errors go to stderr.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import typer

from dpq_core.recipe import DeviceKind, Recipe, RecipeError, load_recipe
from flows.by_name import flow_named
from flows.cli.attest import attest
from flows.cli.automation import approve, deploy, reject, trigger, webhook
from flows.cli.convnet import app as convnet_app
from flows.cli.errors import errors, print_json
from flows.cli.importing import import_model
from flows.cli.mirror import app as mirror_app
from flows.cli.options import AsJson, Overrides, RecipePath
from flows.cli.results import printing_to_stderr
from flows.cli.rollback import rollback
from flows.cli.signals import ending_cleanly, exit_codes, leave_threads, undelivered
from flows.cli.store import app as store_app
from infra.settings import home

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(convnet_app, name="convnet")
app.add_typer(mirror_app, name="mirror")
app.add_typer(store_app, name="store")
app.add_typer(trigger, name="trigger")
for command in (attest, rollback, deploy, approve, reject, webhook):
    app.command()(command)
app.command("import")(import_model)


_Result = TypeVar("_Result")


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"dpq {version('dpq')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="say it, end")
    ] = False,
) -> None:
    """Release pipeline for W4A8 language models."""


@app.command()
def release(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Quantize, measure, gate and register: 0 promoted, 2 rejected or inspected, 1 error."""
    with errors(as_json):
        parsed = load_recipe(recipe, overrides)
        _say_what_comes(parsed)
        result = _run(parsed, lambda: _flow("release")(parsed))
        if as_json:
            print_json(result.as_dict())
        else:
            from flows.cli.terminal import show_release

            show_release(result)
        if result.verdict.verdict != "promoted":
            raise typer.Exit(2)


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="hub id or folder; 16 bits or quantized")],
    recipe: Annotated[Path, typer.Option("--recipe", help="whose evaluation to run")],
    against: Annotated[
        str | None, typer.Option("--against", help="baseline to compare with, document by document")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure any checkpoint, alone or against another."""
    with errors(as_json):
        parsed = load_recipe(recipe, overrides)
        report = _run(parsed, lambda: _flow("evaluate")(parsed, checkpoint, against))
        if as_json:
            print_json(report.as_dict())
        else:
            from flows.cli.terminal import show_evaluation

            show_evaluation(report)
        if not report.complete:
            said = "not all was measured; run again when it can be, what is finished is kept"
            print(f"error: {said}: {'; '.join(report.reasons)}", file=sys.stderr)
            raise typer.Exit(1)


@app.command()
def quantize(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Stop after the verified checkpoint."""
    with errors(as_json):
        parsed = load_recipe(recipe, overrides)
        _say_what_comes(parsed, measured=False)
        candidate = _run(parsed, lambda: _flow("quantize")(parsed))
        checkpoint, manifest = candidate.checkpoint, candidate.manifest
        layer_errors = [row["error"] for row in manifest["layers"]]
        from dpq_core.layer.unseen import UnseenSummary

        unseen = UnseenSummary.of(manifest["layers"])
        summary = {
            "checkpoint": str(checkpoint.folder),
            "sha256": checkpoint.sha256,
            "bytes_per_weight": manifest["bytes_per_weight"],
            "layer_error": sum(layer_errors) / len(layer_errors),
            "layers": len(layer_errors),
            "unseen": unseen and dataclasses.asdict(unseen),
            "tokens": manifest["calibration"]["tokens"],
            "tokens_asked": manifest["calibration"]["tokens_asked"],
            "skipped": manifest["skipped"],
            "memory": dataclasses.asdict(candidate.memory),
        }
        if as_json:
            print_json(summary)
        else:
            for name, value in summary.items():
                print(f"{name}: {value}")


@app.command()
def compare(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the ladder: a row a variant of the recipe's scheme."""
    with errors(as_json):
        parsed = load_recipe(recipe, overrides)
        rows = _run(parsed, lambda: _flow("compare")(parsed))
        if as_json:
            print_json({"rows": [dataclasses.asdict(row) for row in rows]})
        else:
            from flows.cli.terminal import show_ladder

            show_ladder(rows)


@app.command()
def bench(
    recipe: RecipePath,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="cpu, cuda, hpu; repeatable; by default the recipe's or all"),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", help="random weights: llama-160m, llama-1b, llama-3-8b"),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="native checkpoint of the recipe's model")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Time BF16, FP8, W4A16 and W4A8 of one model; a device that is not here says so."""
    with errors(as_json):
        parsed = load_recipe(recipe, overrides)
        run, kinds = _flow("benchmark"), [_kind(name) for name in device or ()]
        result = _run(parsed, lambda: run(parsed, kinds, shape, checkpoint))
        if as_json:
            print_json(result.as_dict())
        else:
            from flows.cli.terminal import show_benchmark

            show_benchmark(result)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a native checkpoint")],
    name: Annotated[
        str, typer.Option("--format", help="compressed-tensors, gptq, inc, fp8_to_int")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", help="folder; by default in the checkpoint's store")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint for other people's loaders, and verify it."""
    with errors(as_json):
        from tasks.support.exports import export_by_hand

        folder, manifest = export_by_hand(checkpoint, name, output)
        keys = ("format", "bits_per_weight", "distance", "checks")
        summary = {"export": str(folder)} | {key: manifest[key] for key in keys}
        if as_json:
            print_json(summary)
        else:
            for key, value in summary.items():
                print(f"{key}: {value}")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a native checkpoint or an export")],
    as_json: AsJson = False,
) -> None:
    """Compare every byte with the manifest: 0 intact, 1 not, with the file or tensor."""
    with errors(as_json):
        from dpq_core.checkpoint.exports import verify as verify_folder

        kind = verify_folder(checkpoint)
        if as_json:
            print_json({"checkpoint": str(checkpoint), "kind": kind, "intact": True})
        else:
            print(f"{checkpoint}: {kind}, intact")


@app.command()
def ui() -> None:
    """Leave the Prefect server and MLflow up, print their addresses, stop with Ctrl-C."""
    import threading

    from infra.orchestration.services import ui as run_ui

    with errors(as_json=False), ending_cleanly(), run_ui(home()) as addresses:
        print(f"Prefect  {addresses.prefect}\nMLflow   {addresses.mlflow}\nCtrl-C stops both.")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopping …")


def quiet_libraries() -> None:
    """Before they are imported: nothing reports home, or prints where progress is shown."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is shown by flows.cli.terminal
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Console script."""
    quiet_libraries()
    try:
        app()
    except SystemExit as end:
        if isinstance(end.code, int) and (end.code in exit_codes() or undelivered()):
            leave_threads(end.code)
        raise


def _kind(name: str) -> DeviceKind:
    """The kind of a device. (Typer has no lists of literals.)"""
    for kind in get_args(DeviceKind):
        if name == kind:
            return cast(DeviceKind, kind)
    raise RecipeError(f"--device {name}: choose {', '.join(get_args(DeviceKind))}")


def _flow(name: str) -> Callable[..., Any]:
    """A flow with the runner of its recipe."""
    flow = flow_named(name)

    def run(recipe: Recipe, *arguments: Any) -> Any:
        from flows.running.runners import task_runner

        return flow.with_options(task_runner=task_runner(recipe.execution))(recipe, *arguments)

    return run


def _say_what_comes(recipe: Recipe, measured: bool = True) -> None:
    """On stderr, before anything starts."""
    print(f"{recipe.registered_name}: looking at model, texts and processor …", file=sys.stderr)
    from flows.cli.forecast import forecast

    for line in forecast(recipe, measured):
        print(line, file=sys.stderr)


def _run(recipe: Recipe, run: Callable[[], _Result]) -> _Result:
    from infra.orchestration.services import services

    with ending_cleanly(), printing_to_stderr(), services(home()):
        from flows.cli.progress import progress

        with progress():
            return run()
