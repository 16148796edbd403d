"""`dpq mirror`: the suites' data without a hub."""

import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dpq_core.data import mirror
from dpq_core.data.mirror import MirroredSplit, MirrorError
from dpq_core.data.mirrored_suites import MIRRORED
from flows.cli.errors import errors, print_json
from flows.cli.options import AsJson

app = typer.Typer(no_args_is_help=True, help="The suites' data without a hub.")


@app.command()
def check(
    mirror_url: Annotated[str, typer.Argument(metavar="DIR", help="folder or s3://…")],
    as_json: AsJson = False,
) -> None:
    """Say for each suite what is there: 0 all official, 2 something missing or different."""
    with errors(as_json):
        if not mirror.is_remote(mirror_url):
            _show(mirror.check(Path(mirror_url)), as_json)
            return
        with tempfile.TemporaryDirectory() as folder:
            mirror.fetch(mirror_url, Path(folder), list(MIRRORED))
            _show(mirror.check(Path(folder)), as_json)


@app.command()
def make(
    folder: Annotated[str, typer.Argument(metavar="DIR")],
    suites: Annotated[
        list[str] | None, typer.Option("--suite", help="only this one, repeatable")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the suites from the Hugging Face hub: 0 all official, 2 something missing."""
    with errors(as_json):
        if mirror.is_remote(folder):
            raise MirrorError(f"{folder}: mirrors are made in a folder: make one and copy it there")
        _show(_told(mirror.make(Path(folder), suites or list(MIRRORED))), as_json)


def _told(splits: Iterable[MirroredSplit]) -> Iterator[MirroredSplit]:
    """The same, a line each on stderr as they come: the hub takes minutes."""
    for split in splits:
        print(f"{split.suite} {split.split}: {split.status}", file=sys.stderr)
        yield split


def _show(splits: Iterable[MirroredSplit], as_json: bool) -> None:
    """A row a split, and the exit code: few-shot examples may be missing, but not differ."""
    from rich.console import Console
    from rich.table import Table

    found = list(splits)
    if as_json:
        rows = [asdict(split) | {"needed": split.needed, "status": split.status} for split in found]
        print_json({"complete": all(split.fine for split in found), "splits": rows})
    else:
        names = ("suite", "split", "for", "documents", "official", "digest", "status")
        table = Table(*names, box=None, padding=(0, 2, 0, 0))  # for 80 columns
        for column in table.columns[:-1]:
            column.no_wrap = True
        for split in found:
            count = "–" if split.documents is None else f"{split.documents:,}"
            use = "score" if split.needed else "few-shot"
            name = (split.digest or "–")[:8]
            official = f"{split.official:,}"
            table.add_row(split.suite, split.split, use, count, official, name, split.status)
        Console().print(table)
    if not all(split.fine for split in found):
        raise typer.Exit(2)
