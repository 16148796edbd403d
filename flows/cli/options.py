"""What several commands take, as Typer's annotations."""

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(help="YAML file", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key.path=value, repeatable")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
