"""What a person sees: progress on stderr while a flow runs, tables at its end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from flows.compare import Row
from flows.release import Release
from flows.report import gate_rows
from tasks.progress import reporting_to

_COLOURS = {"promoted": "green", "rejected": "red"}


@contextmanager
def progress() -> Iterator[None]:
    """Bars for the stages that run inside; nothing where stderr is no terminal but lines."""
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    ids: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in ids:
            ids[stage] = bars.add_task(stage, total=total)
            if not console.is_terminal:
                console.print(f"{stage} …", highlight=False)
        bars.update(ids[stage], completed=done, total=total)

    with bars, reporting_to(report):
        yield


def show_release(release: Release) -> None:
    """Verdict, gate table, and where everything is."""
    console = Console()
    verdict = release.verdict
    table = Table("metric", "baseline", "candidate", "delta", "limit", "result")
    for row in gate_rows(verdict):
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    colour = _COLOURS[verdict.verdict]
    console.print(f"[bold {colour}]{verdict.verdict}[/]", highlight=False)
    for reason in verdict.reasons:
        console.print(f"  {reason}", highlight=False)
    registration = release.registration
    bits = 8 * release.manifest["bytes_per_weight"]
    console.print(
        f"{registration.name} version {registration.version}, {bits:.2f} bits a weight\n"
        f"checkpoint {release.checkpoint}\nMLflow run {release.run_id}",
        highlight=False,
        soft_wrap=True,
    )


def show_ladder(rows: Sequence[Row]) -> None:
    """A row a variant."""
    table = Table()
    table.add_column("variant", no_wrap=True)
    for title in ("perplexity", "increase", "bits/w", "layer error"):
        table.add_column(title, justify="right")
    for row in rows:
        if row.error:
            table.add_row(row.variant, "failed")
            continue
        table.add_row(
            row.variant,
            f"{row.perplexity:.4f}",
            f"{row.increase:+.4f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.layer_error:.3g}",
        )
    console = Console()
    console.print(table)
    for row in rows:
        if row.error:
            console.print(f"{row.variant}: {row.error}", highlight=False, soft_wrap=True)
