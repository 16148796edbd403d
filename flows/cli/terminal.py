"""What a person sees at the end of a flow: tables. Progress is in `flows.cli.progress`."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dpq_core.verdict.standing import Metric
from flows.benchmark import Benchmark
from flows.evaluate import EvaluationReport
from flows.release.release import Release
from flows.reporting.ladder import Row, cells, columns
from flows.reporting.prefect_artifacts import (
    gate_rows,
    model_notes,
    notes,
    score_rows,
    standings,
)
from tasks.support.speeds import conditions, shown

if TYPE_CHECKING:
    from flows.convnet import ConvRelease

_COLOURS = {"promoted": "green", "rejected": "red", "inspected": "yellow", "withheld": "yellow"}
_UNLIMITED = 200  # characters a line, where stdout is a file


def show_release(release: Release) -> None:
    """Verdict, gate table, what repair did, and where everything is."""
    console = _console()
    verdict = release.verdict
    _show_metrics(console, verdict.metrics)
    if len(release.rounds) > 1:
        _show(console, release.rounds)
    console.print(f"[bold {_COLOURS[verdict.verdict]}]{verdict.verdict}[/]", highlight=False)
    for reason in verdict.reasons:
        console.print(f"  {reason}", highlight=False, markup=False)
    console.print(f"  {standings(verdict.metrics)}", highlight=False)
    console.print(f"  judged on {verdict.judged_on}", highlight=False)
    for line in model_notes(release.manifest):
        console.print(f"  {line}", highlight=False, markup=False)
    for export in release.exports:
        console.print(
            f"export {export.name} {export.artifact.folder}", highlight=False, soft_wrap=True
        )
    registration = release.registration
    bits = 8 * release.manifest["bytes_per_weight"]
    console.print(
        f"{registration.name} version {registration.version}, {bits:.2f} bits a weight\n"
        f"memory: {release.memory.line}; evaluation {release.scoring.line}\n"
        f"checkpoint {release.checkpoint}\nMLflow run {release.run_id}\n"
        f"report {release.report.address or f'failed: {release.report.error}'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def show_evaluation(report: EvaluationReport) -> None:
    """A checkpoint's scores, or the gate table where it was compared."""
    console = _console()
    if report.metrics:
        _show_metrics(console, report.metrics)
    else:
        _show(console, score_rows(report.scores))
    if report.metrics:
        console.print(f"  {standings(report.metrics)}", highlight=False)
    for reason in report.reasons:
        console.print(f"  {reason}", highlight=False, markup=False)
    console.print(f"MLflow run {report.run_id}", highlight=False)


def show_ladder(rows: Sequence[Row]) -> None:
    """A row a variant, and why some have no numbers. A suite's own column is on the page alone."""
    console = _console()
    titles = columns(rows)
    shown = [i for i, title in enumerate(titles) if not title.startswith("accuracy.")]
    table = Table()
    for number in shown:
        table.add_column(titles[number], justify="right" if number else "left", overflow="fold")
    for row in rows:
        texts = cells(row, rows)
        table.add_row(*(texts[number] for number in shown))
    console.print(table)
    for row in rows:
        if row.error:
            console.print(f"{row.variant}: {row.error}", highlight=False, soft_wrap=True)


def show_convnet(release: "ConvRelease") -> None:
    """Verdict, gate table, latency, and where the classifier is."""
    console = _console()
    _show_metrics(console, release.verdict.metrics)
    if release.latency:
        _show(console, release.latency)
    else:
        console.print("no integer kernels for this scheme: simulated", highlight=False)
    if release.worst_layers:
        _show(console, release.worst_layers)
    for note in release.notes:
        console.print(f"  {note}", highlight=False, markup=False)
    verdict = release.verdict.verdict
    console.print(f"[bold {_COLOURS[verdict]}]{verdict}[/] ({release.method})", highlight=False)
    for reason in release.verdict.reasons:
        console.print(f"  {reason}", highlight=False, markup=False)
    console.print(
        f"  {standings(release.verdict.metrics)}\n"
        f"  judged on {release.verdict.judged_on}\n"
        f"{release.registration.name} version {release.registration.version}\n"
        f"classifier {release.classifier}\nMLflow run {release.run_id}",
        highlight=False,
        soft_wrap=True,
    )


def show_benchmark(benchmark: Benchmark) -> None:
    """A row a device, variant and batch, and what a reader has to know of the numbers."""
    console = _console()
    _show(console, shown(benchmark.devices))
    for times in benchmark.devices:
        for line in conditions(times):
            console.print(f"  {times.device}: {line}", highlight=False, markup=False)
    console.print(
        f"MLflow run {benchmark.run_id}\nfor a log {benchmark.log}",
        highlight=False,
        soft_wrap=True,
    )


def show_tables(*tables: Sequence[Mapping[str, object]]) -> None:
    """Rows as they are, a table each."""
    console = _console()
    for rows in tables:
        _show(console, rows)


def _console() -> Console:
    """Tables in full where nobody's window limits them."""
    return Console() if sys.stdout.isatty() else Console(width=_UNLIMITED)


def _show_metrics(console: Console, metrics: Mapping[str, Metric]) -> None:
    _show(console, gate_rows(metrics))
    for note in notes(metrics):
        console.print(f"  {note}", highlight=False, markup=False)


def _show(console: Console, rows: Sequence[Mapping[str, object]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table()
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_text(row.get(name, "")) for name in names))
    console.print(table)


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):  # an interval
        return " … ".join(f"{end:+.2f}" for end in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)
