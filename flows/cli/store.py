"""`dpq store`: what lies in it, whether it is whole, and room."""

import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpq_core.recipe import ExecutionSection
from flows.cli.errors import errors, print_json
from flows.cli.options import AsJson
from infra.settings import home
from infra.store.disk import shown_bytes, space_left

if TYPE_CHECKING:
    from infra.care import Stored

app = typer.Typer(no_args_is_help=True, help="The artifact store: what is there, whole, needed.")

StorePath = Annotated[Path, typer.Option("--store", help="folder, as execution.store")]
_DEFAULT = Path(ExecutionSection().store)


@app.command("ls")
def ls(store: StorePath = _DEFAULT, as_json: AsJson = False) -> None:
    """Stages: how many artifacts, how many bytes, and how long nobody has used them."""
    with errors(as_json):
        from infra.care import stored
        from infra.store import Store

        rows = _by_stage(list(stored(Store(store))))
        if as_json:
            print_json({"store": str(store.resolve()), "stages": rows})
        else:
            _show(rows)
            print(f"{store}: {space_left(store)}")


@app.command()
def verify(store: StorePath = _DEFAULT, as_json: AsJson = False) -> None:
    """Read every byte of every artifact: 0 all as their manifests say, 2 something is wrong."""
    with errors(as_json):
        from flows.cli.progress import progress
        from infra.care import problems, stored
        from infra.store import Store
        from tasks.support.progress import stepper

        opened = Store(store)
        artifacts = list(stored(opened))
        wrong: list[str] = []
        with progress():
            step = stepper("verify", len(artifacts))
            for artifact in artifacts:
                wrong += problems(opened, artifact)
                step()
        if as_json:
            print_json({"artifacts": len(artifacts), "wrong": wrong})
        else:
            for line in wrong:
                print(line)
            total = shown_bytes(sum(artifact.size for artifact in artifacts))
            print(f"{len(artifacts)} artifacts, {total}: {len(wrong) or 'no'} files are wrong")
            if wrong:
                print("remove the artifacts' folders and run again: they will be made anew")
        if wrong:
            raise typer.Exit(2)


@app.command()
def gc(
    store: StorePath = _DEFAULT,
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0, help="keep what was used within these days")
    ] = 14,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what no registered version, no run at work, and nobody of late refers to."""
    with errors(as_json):
        from infra.care import DAY, StoreCareError, collect
        from infra.registry.tracking import tracking_store
        from infra.store import Store

        if not store.is_dir():
            raise StoreCareError(f"{store}: no such store; name it with --store")
        registry = tracking_store(home())[0]
        result = collect(Store(store), [registry], keep_days * DAY, dry_run)
        freed = sum(artifact.size for artifact in result.deleted)
        for run in result.runs:
            print(f"{run} is at work: what it may use is kept", file=sys.stderr)
        if as_json:
            stages = _by_stage(result.deleted)
            print_json({"dry_run": dry_run, "bytes": freed, "stages": stages, "runs": result.runs})
        else:
            _show(_by_stage(result.deleted))
            verb = "would free" if dry_run else "freed"
            print(f"{verb} {shown_bytes(freed)}; {len(result.registered)} kept for the registry")


def _by_stage(artifacts: "list[Stored]") -> list[dict[str, str | int | float]]:
    """A row a stage. idle: days since the last use, of the newest and of the oldest artifact."""
    from infra.care import DAY

    stages: dict[str, list[Stored]] = defaultdict(list)
    for artifact in artifacts:
        stages[artifact.stage].append(artifact)
    return [
        {
            "stage": stage,
            "artifacts": len(each),
            "bytes": sum(artifact.size for artifact in each),
            "days unused, least": min(artifact.idle for artifact in each) / DAY,
            "days unused, most": max(artifact.idle for artifact in each) / DAY,
        }
        for stage, each in sorted(stages.items())
    ]


def _show(rows: list[dict[str, str | int | float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "artifacts", "size", "days unused", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        days = f"{row['days unused, least']:.1f} … {row['days unused, most']:.1f}"
        size = shown_bytes(float(row["bytes"]))
        table.add_row(str(row["stage"]), f"{row['artifacts']:,}", size, days)
    if rows:
        Console().print(table)
