"""`dpq import`: other people's files as folders of 16 bits."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.errors import errors, print_json
from flows.cli.options import AsJson


def import_model(
    file: Annotated[Path, typer.Argument(help="a model, FILE.gguf")],
    folder: Annotated[Path, typer.Argument(help="to write, as model.id reads it")],
    rounded: Annotated[
        bool, typer.Option("--rounded", help="take a quantized file, rounded to BF16")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a GGUF file's model as safetensors in 16 bits, where these hold the same numbers."""
    with errors(as_json):
        from dpq_core.checkpoint.gguf import import_gguf

        summary = {"model": str(folder)} | dataclasses.asdict(import_gguf(file, folder, rounded))
        if as_json:
            print_json(summary)
        else:
            for name, value in summary.items():
                print(f"{name}: {value}")
