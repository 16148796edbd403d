"""`dpq attest`: does an engine compute an export as we do?"""

from pathlib import Path
from typing import Annotated, Any

import typer

from dpq_core.recipe import AttestSection, Recipe, RecipeError, load_recipe
from flows.cli.errors import errors, print_json
from flows.cli.options import AsJson, Overrides
from flows.cli.signals import ending_cleanly


def attest(
    export: Annotated[Path, typer.Argument(help="folder of an export, or of any checkpoint")],
    recipe: Annotated[Path, typer.Option("--recipe", help="whose perplexity text, attest, limits")],
    engine: Annotated[
        str | None, typer.Option("--engine", help="vllm, transformers, or a server's address")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="its name on a server at an address")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="what is right; by default the export itself")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="say what moved since the last statement")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """State how far an engine's log-likelihoods are from ours: 0 passed, 2 refused, 1 error."""
    with errors(as_json), ending_cleanly():
        from dpq_core.attestation.statement import FILE, moved, read_statement
        from dpq_core.machine.device import resolve_device
        from tasks.support.attestation import attested

        last = read_statement(export / FILE)["predicate"] if again else None
        asked = _asked(load_recipe(recipe, overrides), engine, model, against)
        device = resolve_device(asked.execution.device)
        found = attested(asked, export, against, device, last)
        changes = moved(last, found.predicate) if last else {}
        if as_json:
            about: dict[str, Any] = {"export": str(export), "statement": str(export / FILE)}
            moves = {name: {"before": a, "after": b} for name, (a, b) in changes.items()}
            print_json(about | found.predicate | {"moved": moves if again else None})
        else:
            _show(found.predicate, found.line, changes, again)
        if found.wrong:
            raise typer.Exit(2)


def _asked(recipe: Recipe, engine: str | None, model: str | None, against: Path | None) -> Recipe:
    """The recipe with the engine of the command line.

    Raises:
        RecipeError: no engine, or nothing that is right.
    """
    section = recipe.attest
    given: dict[str, Any] = {"engine": engine or section.engine, "model": model or section.model}
    if given["engine"] != section.engine:
        given["arguments"] = []  # they are of the other one
    if given["engine"] is None:
        raise RecipeError("no engine: say --engine (attest.engine) vllm, transformers or http://…")
    if section.reference == "checkpoint" and against is None:
        raise RecipeError(
            "attest.reference is checkpoint: say which one, --against FOLDER of a native checkpoint"
        )
    try:
        section = AttestSection.model_validate(section.model_dump() | given)
    except ValueError as error:
        raise RecipeError(
            f"--engine {engine}: it is vllm, transformers, or http://… of a server"
        ) from error
    return recipe.model_copy(update={"attest": section})


def _show(
    predicate: dict[str, Any], line: str, changes: dict[str, tuple[Any, Any]], again: bool
) -> None:
    print(line)
    for reason in predicate["reasons"]:
        print(f"  {reason}")
    if again:
        print("moved since the last statement:" if changes else "nothing moved")
        for name, (before, after) in changes.items():
            print(f"  {name}: {before} → {after}")
