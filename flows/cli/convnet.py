"""`dpq convnet RECIPE`, `dpq convnet compare RECIPE`, `dpq convnet export FOLDER TO`: the second
pipeline."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dpq_core.convnet.recipe import ConvRecipe, load_conv_recipe
from dpq_core.errors import check_extra
from flows.cli.errors import errors, print_json
from flows.cli.options import AsJson, Overrides, RecipePath
from flows.cli.results import printing_to_stderr
from flows.cli.signals import ending_cleanly
from infra.settings import home


class _ReleaseUnlessNamed(TyperGroup):
    """A group whose first word may be a recipe in place of a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["release", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ReleaseUnlessNamed,
    no_args_is_help=True,
    help="Convolutional classifiers in INT8: `dpq convnet RECIPE` releases one.",
)


@app.command()
def release(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Quantize, measure, gate and register: 0 promoted, 2 rejected, 1 error."""
    with errors(as_json):
        result = _run("convnet", load_conv_recipe(recipe, overrides))
        if as_json:
            print_json(result.as_dict())
        else:
            from flows.cli.terminal import show_convnet

            show_convnet(result)
        if result.verdict.verdict != "promoted":
            raise typer.Exit(2)


@app.command()
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    row: Annotated[list[str] | None, typer.Option(help="of the ladder, repeatable")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the whitepaper's ladder on the recipe's network, and the latency of its integers."""
    with errors(as_json):
        found = _run("convnet_ladder", load_conv_recipe(recipe, overrides), row)
        if as_json:
            print_json(found)
        else:
            from flows.cli.terminal import show_tables

            show_tables(*found.values())


@app.command()
def export(
    classifier: Annotated[Path, typer.Argument(help="folder of a released one", metavar="FOLDER")],
    to: Annotated[Path, typer.Argument(help="new folder", metavar="TO")],
    format_: Annotated[str, typer.Option("--format", help="onnx, openvino")],
    pictures: Annotated[Path, typer.Option(help="folder of pictures to compare classes on")],
    most: Annotated[int, typer.Option(min=8, help="pictures")] = 64,
    as_json: AsJson = False,
) -> None:
    """Write a classifier for another runtime, and compare it with the file that was scored."""
    with errors(as_json):
        check_extra("dpq convnet", "convnet", "onnxruntime")
        from dpq_core.convnet.exports import export_classifier, pictures_in, sample, writable

        writable(format_)
        found = sample(classifier, pictures_in(pictures, most))
        written = export_classifier(classifier, format_, to, found)
        if as_json:
            print_json(asdict(written))
        else:
            from flows.cli.terminal import show_tables

            show_tables([{"file": str(to / n), "bytes": size} for n, size in written.files.items()])
            typer.echo(
                f"{written.same} of {written.pictures} pictures have the scored file's class;"
                f" logits {100 * written.distance:.2f} % away"
            )


def _run(name: str, recipe: ConvRecipe, *more: Any) -> Any:
    """A flow on its services; imported late, as in `flows.cli.main`."""
    check_extra("dpq convnet", "convnet", "onnxruntime", "onnxscript", "sklearn")
    from infra.orchestration.services import services

    with ending_cleanly(), printing_to_stderr(), services(home()):
        from flows import convnet
        from flows.cli.progress import progress

        run: Callable[..., Any] = getattr(convnet, name)
        with progress():
            return run(recipe, *more)
