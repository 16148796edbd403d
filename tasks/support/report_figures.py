"""The release report's charts. Black text and grey lines, which a page may colour as it likes
(`svg {fill: currentColor}`); nothing is told by colour alone. Lengths in points of 1/72 inch, which
are the page's pixels.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpq_core.benchmark.throughput import Cell, Times
from tasks.support.figures import spread

_BLUE, _RED, _GREY = "#2f7ded", "#d8412f", "#808080"
_FONT = 10
_HEIGHT = 330
_LEFT, _RIGHT = 52, 12
_BETWEEN = 0.04  # of all layers: the gap between two kinds
_RANK = 15  # sideways, between two ranks
_NARROW = 500  # width, below which a legend has two columns
_MANY = 2000  # layers, above which dots become a picture inside the drawing

_MARKERS: dict[str, dict[str, Any]] = {  # by verdict; any other is a hollow circle
    "promoted": {"marker": "o", "color": _BLUE},
    "rejected": {"marker": "X", "color": _RED},
}
_LINES = {  # by variant
    "bf16": ("o", "#808080"),
    "fp8": ("s", "#d9730d"),
    "w4a16": ("^", "#0f9d6b"),
    "w4a8": ("D", _BLUE),
}
_OTHER: dict[str, Any] = {"marker": "o", "color": _GREY, "markerfacecolor": "none"}


def worst_layers(errors: Mapping[str, float], most: int) -> list[str]:
    """Names of the layers with the largest errors, the worst first; not finite is worse than any
    number."""
    return sorted(errors, key=lambda name: _badness(errors[name]), reverse=True)[:most]


def layers_figure(errors: Mapping[str, float], ranked: Sequence[str], width: float) -> Figure:
    """Relative output error of every layer on a logarithmic axis: one column a kind of layer (the
    last part of its name), in it the blocks in order, its median a line.

    `ranked` are numbered from 1 along the top. An error of zero stands on the axis, one that is not
    finite at the top.
    """
    figure, axes = _axes(width, top=40, bottom=78)
    places, ticks = _columns(list(errors))
    shown = [error for error in errors.values() if _drawable(error)] or [1.0]
    low, high = min(shown) / 1.6, max(shown) * 1.6
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    pad = max(1.0, 0.015 * len(errors))
    axes.set_xlim(-pad, max(places.values()) + pad)
    heights = {name: _within(error, low, high) for name, error in errors.items()}
    size = 5 if len(errors) < 200 else 3
    axes.plot(
        [places[name] for name in errors],
        [heights[name] for name in errors],
        "o",
        color=_BLUE,
        alpha=0.75,
        markersize=size,
        markeredgewidth=0,
        rasterized=len(errors) > _MANY,
        clip_on=False,
    )
    for members in ticks.values():
        middle = median(heights[name] for name in members)
        ends = [places[members[0]] - 0.4, places[members[-1]] + 0.4]
        axes.plot(ends, [middle, middle], color=_GREY, linewidth=1.5)
    _number(axes, [(places[name], heights[name]) for name in ranked], size)
    centres = [(places[members[0]] + places[members[-1]]) / 2 for members in ticks.values()]
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(centres, list(ticks), parse_math=False, **turned)
    axes.tick_params(axis="x", length=0)
    _title(axes, "relative output error (log)", above=24)
    return figure


def history_figure(
    versions: Sequence[tuple[int, float, str]],
    current: int,
    title: str,
    limit: float | None,
    width: float,
) -> Figure:
    """One number over a model's versions, of (version, value, verdict); `limit` as a line."""
    figure, axes = _axes(width, top=32, bottom=62, height=270)
    for place, (version, value, verdict) in enumerate(versions):
        _version(axes, place, value, verdict, version == current)
    step = math.ceil(len(versions) / (width / 40))
    labelled = range(len(versions) - 1, -1, -step)
    axes.set_xticks(list(labelled), [str(versions[place][0]) for place in labelled])
    axes.set_xlim(-0.6, len(versions) - 0.4)
    axes.axhline(0, color=_GREY, linewidth=1)
    if limit is not None:
        axes.axhline(limit, color=_GREY, linewidth=1.2, linestyle="--")
        text: dict[str, Any] = {
            "xycoords": axes.get_yaxis_transform(),
            "textcoords": "offset points",
        }
        axes.annotate("limit", (1, limit), (-2, 3), ha="right", fontsize=_FONT, **text)
    axes.yaxis.set_major_formatter("{x:+g}")
    _legend(axes, "version", {verdict for _, _, verdict in versions})
    _title(axes, title)
    return figure


def throughput_figure(
    versions: Sequence[tuple[int, float, float, str]], current: int, title: str, width: float
) -> Figure:
    """A number (`title`) against tokens per second, of (version, tokens/s, value, verdict)."""
    figure, axes = _axes(width, top=32, bottom=62, height=270)
    for version, speed, value, verdict in versions:
        _version(axes, speed, value, verdict, version == current)
        axes.annotate(
            str(version), (speed, value), (7, 4), textcoords="offset points", fontsize=_FONT
        )
    axes.margins(0.12)
    _legend(axes, "tokens per second", {verdict for *_, verdict in versions})
    _title(axes, title)
    return figure


def batches_figure(times: Times, width: float) -> Figure:
    """Decoding speed against batch on logarithmic axes: a line and a marker a variant; in the same
    colour, dashed, what its bytes and the device's rates allow; dotted, what the product's rate
    alone would."""
    wide = width > _NARROW
    figure, axes = _axes(width, top=32, bottom=76 if wide else 108, height=400)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({cell.batch for cell in times.cells})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    variants: dict[str, list[Cell]] = {}
    for cell in times.cells:
        variants.setdefault(cell.variant, []).append(cell)
    for variant, cells in variants.items():
        marker, colour = _LINES[variant]
        cells.sort(key=lambda cell: cell.batch)
        style: dict[str, Any] = {"color": colour, "linewidth": 1.5}
        speeds = [(c.batch, c.decode_tokens_per_second or math.nan) for c in cells]
        limits = [(c.batch, c.limit or math.nan) for c in cells]
        places, heights = zip(*speeds, strict=True)
        axes.plot(places, heights, marker, linestyle="-", markersize=7, label=variant, **style)
        axes.plot(*zip(*limits, strict=True), "--", **style | {"linewidth": 1}, alpha=0.8)
    axes.plot([], [], "--", color=_GREY, linewidth=1, label="roofline of each")
    if times.product_limit is not None:
        line: dict[str, Any] = {"color": _GREY, "linewidth": 1, "label": "BF16 product rate"}
        axes.axhline(times.product_limit, linestyle=":", **line)
    axes.set_xlabel("sequences at a time", fontsize=_FONT)
    axes.legend(
        ncols=len(variants) + 2 if wide else 2,
        fontsize=_FONT,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        handletextpad=0.4,
        columnspacing=1,
        borderpad=0,
    )
    _title(axes, f"decoding, tokens/s (log), {times.device}")
    return figure


def _axes(width: float, top: int, bottom: int, height: int = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.subplots_adjust(
        left=_LEFT / width,
        right=1 - _RIGHT / width,
        bottom=bottom / height,
        top=1 - top / height,
    )
    axes = figure.add_subplot()
    axes.tick_params(which="both", color=_GREY, labelsize=_FONT)
    axes.spines[:].set_color(_GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GREY, alpha=0.25)
    return figure, axes


def _title(axes: Axes, title: str, above: int = 12) -> None:
    axes.annotate(
        title, (0, 1), (4 - _LEFT, above), xycoords="axes fraction", textcoords="offset points",
        fontsize=_FONT, parse_math=False,
    )  # fmt: skip


def _columns(names: Sequence[str]) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Where each layer stands, and the layers of each kind, kinds in order of appearance."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    gap = max(1.0, _BETWEEN * len(names))
    places: dict[str, float] = {}
    end = 0.0
    for members in kinds.values():
        places |= {name: end + row for row, name in enumerate(members)}
        end += len(members) + gap
    return places, kinds


def _number(axes: Axes, points: Sequence[tuple[float, float]], size: float) -> None:
    """Ranks above the axes in a row, each tied to its point."""
    pixels = axes.transData.transform(points).tolist() if points else []
    order = sorted(range(len(points)), key=lambda rank: (pixels[rank][0], rank))
    frame = axes.get_window_extent()
    wanted = [pixels[rank][0] for rank in order]
    for rank, place in zip(order, spread(wanted, _RANK, frame.x0, frame.x1), strict=True):
        axes.annotate(
            str(rank + 1),
            points[rank],
            (place, frame.y1 + 12),
            textcoords="figure pixels",
            ha="center",
            va="center",
            fontsize=_FONT,
            arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.7, "shrinkB": 0},
            annotation_clip=False,
        )
        axes.plot(*points[rank], "o", color=_RED, markersize=size + 2, clip_on=False)


def _version(axes: Axes, x: float, y: float, verdict: str, is_current: bool) -> None:
    axes.plot(x, y, linestyle="", markersize=8, zorder=3, **_MARKERS.get(verdict, _OTHER))
    if is_current:
        axes.plot(x, y, "o", color=_GREY, markersize=16, markerfacecolor="none", zorder=2)


def _legend(axes: Axes, title: str, verdicts: set[str]) -> None:
    """Under the axes: what they count, and a marker for each verdict; a ring is this version."""
    axes.set_xlabel(title, fontsize=_FONT)
    for verdict in sorted(verdicts):
        style = _MARKERS.get(verdict, _OTHER)
        axes.plot([], [], linestyle="", markersize=8, label=verdict, **style)
    ring: dict[str, Any] = {"color": _GREY, "markersize": 12, "markerfacecolor": "none"}
    axes.plot([], [], "o", label="this version", **ring)
    axes.legend(
        ncols=len(verdicts) + 1,
        fontsize=_FONT,
        frameon=False,
        loc="upper right",
        bbox_to_anchor=(1, -0.17),
        handletextpad=0.2,
        columnspacing=1,
        borderpad=0,
    )


def _drawable(error: float) -> bool:
    return math.isfinite(error) and error > 0


def _within(error: float, low: float, high: float) -> float:
    """Where an error stands on a logarithmic axis: at its ends what it cannot show."""
    return error if _drawable(error) else low if error == 0 else high


def _badness(error: float) -> float:
    return error if math.isfinite(error) else math.inf
