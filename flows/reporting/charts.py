"""The report's charts: each drawn twice, for a wide window and for a phone, and said in words."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from dpq_core.benchmark.throughput import Times
from flows.reporting.report_data import ReportData
from tasks.benchmark import THROUGHPUT
from tasks.support.figures import svg
from tasks.support.report_figures import (
    batches_figure,
    history_figure,
    layers_figure,
    throughput_figure,
    worst_layers,
)

WORST = 10  # layers that are numbered, and stand in the table
_WIDTHS = {"wide": 720, "narrow": 336}  # pixels; the style sheet shows one of them


@dataclass(frozen=True)
class Chart:
    """Drawings by width, and what they show in words."""

    drawings: Mapping[str, Markup]
    says: str


def layers_chart(data: ReportData) -> Chart:
    errors = data.errors
    ranked = worst_layers(errors, WORST)
    finite = [error for error in errors.values() if math.isfinite(error)]
    says = (
        f"Relative output error of {len(errors)} layers, a column for each kind of layer and in it"
        f" the blocks in order; lines are medians. Numbered are the worst, {len(ranked)} of them,"
        " as in the table."
    )
    if finite:
        says += f" From {min(finite):.3g} to {max(finite):.3g}."
    if any(error == 0 for error in finite):
        says += f" Without error, on the axis: {finite.count(0)}."
    if len(finite) < len(errors):
        says += f" Not finite, at the top: {len(errors) - len(finite)}."
    return _chart("layers", says, lambda width: layers_figure(errors, ranked, width))


def speed_charts(data: ReportData) -> list[Chart]:
    """One a device that was there."""

    def chart(times: Times) -> Chart:
        rates = {f"{c.variant} at {c.batch}": c.decode_tokens_per_second for c in times.cells}
        known = {name: rate for name, rate in rates.items() if rate is not None}
        says = f"Decoding on {times.device}, tokens a second against sequences at a time."
        if known:
            best = max(known, key=lambda name: known[name])
            says += f" Most: {known[best]:,.0f}, {best}."
        return _chart(f"speeds-{times.device}", says, lambda width: batches_figure(times, width))

    return [chart(times) for times in data.speeds if times.cells]


def history_chart(data: ReportData) -> Chart | None:
    """Accuracy against throughput where any version has one; else the first gate's number over the
    versions; None where there are fewer than two points."""
    return _throughput_chart(data) or _number_chart(data)


def _throughput_chart(data: ReportData) -> Chart | None:
    judged = data.judged
    accuracies = [name for name in judged if "accuracy" in name]
    name = (accuracies or judged or [""])[0]
    key = f"{name}.{'candidate' if accuracies else 'delta'}"
    points = [
        (past.number, past.metrics[THROUGHPUT], past.metrics[key], past.verdict)
        for past in data.past
        if {THROUGHPUT, key} <= past.metrics.keys()
    ]
    if len(points) < 2:
        return None
    title = name if accuracies else f"{name}, candidate minus baseline"
    says = f"{title} against tokens per second of the {len(points)} versions that have both."
    return _chart(
        "history", says, lambda width: throughput_figure(points, data.version, title, width)
    )


def _number_chart(data: ReportData) -> Chart | None:
    judged = data.judged
    if not judged:
        return None
    name = judged[0]
    points = [
        (past.number, past.metrics[f"{name}.delta"], past.verdict)
        for past in data.past
        if f"{name}.delta" in past.metrics
    ]
    if len(points) < 2:
        return None
    metric, gates = data.verdict.metrics[name], data.recipe.gates
    limit = None
    if metric.limit is not None and gates.mode == "absolute":
        limit = metric.limit if name.startswith("perplexity") else -metric.limit
    says = (
        f"{name}, candidate minus baseline, over the last {len(points)} versions that have it:"
        f" from {min(p[1] for p in points):+.4f} to {max(p[1] for p in points):+.4f}."
    )
    title = f"{name}, candidate minus baseline"
    return _chart(
        "history", says, lambda width: history_figure(points, data.version, title, limit, width)
    )


def _chart(name: str, says: str, draw: Callable[[int], Figure]) -> Chart:
    def drawing(size: str, width: int) -> Markup:
        return Markup(svg(draw(width), f"{name}-{size}"))

    return Chart({size: drawing(size, width) for size, width in _WIDTHS.items()}, says)
