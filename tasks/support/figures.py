"""Plots, as matplotlib figures: drawn for a page, not for a window."""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import count
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MOST_LABELS = 60
_IDS = re.compile(r'(\bid="|href="#|url\(#)')  # in what matplotlib writes

# The ladder's plot; lengths in points of 1/72 inch.
_METHODS = (  # marker and colour; all show on white and on black
    ("o", "#2f7ded"),
    ("s", "#d9730d"),
    ("^", "#0f9d6b"),
    ("D", "#d6409f"),
    ("v", "#8e6cf0"),
    ("P", "#a88400"),
)
_FLATTENED = 20  # the largest over the median increase, above which the axis bends
_GREY = "#808080"
_FONT, _LINE, _MARKER = 10, 14, 7
_STEP = 9  # sideways, between markers that would touch
_CHARACTER = 0.58 * _FONT  # mean width
_LONGEST = 40  # characters of a label
_HEIGHT = 330  # of the axes, or more where labels need it
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 64, 30, 44  # around them


def layer_error_figure(manifest: Mapping[str, Any]) -> Figure:
    """Relative output error of every layer, in order, on a logarithmic axis."""
    rows = manifest["layers"]
    figure = Figure(figsize=(max(6.0, 0.22 * min(len(rows), _MOST_LABELS) + 2), 4.5))
    axes = figure.add_subplot()
    kinds = sorted({row["name"].rsplit(".", 1)[1] for row in rows})
    for kind in kinds:
        points = [(i, row["error"]) for i, row in enumerate(rows) if row["name"].endswith(kind)]
        axes.plot(*zip(*points, strict=True), "o", markersize=4, label=kind)
    if any(row["error"] > 0 for row in rows):
        axes.set_yscale("log")
    axes.set_ylabel("relative output error")
    axes.set_xlabel("layer, in the order of the model")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.18))
    figure.tight_layout()
    return figure


def ladder_figure(points: Sequence[tuple[str, float, float]], limit: float | None = None) -> Figure:
    """Perplexity increase against bits per weight, of (variant, bits, increase), all finite.

    Bits are in order, not to scale: most of a ladder's twenty variants share one number of bits,
    the next is two percent away, and the 16-bit model four times as far. Each number has a column
    in which every variant is labelled. Colours are of methods, which names begin with.

    Text is black and lines are grey, so that a page can colour the text
    (`svg {fill: currentColor}`) and show both on a dark ground.
    """
    methods = list(dict.fromkeys(_method(variant) for variant, _, _ in points))
    columns: dict[str, list[tuple[str, float]]] = {}
    for variant, bits, increase in sorted(points, key=lambda point: (round(point[1], 2), point[2])):
        columns.setdefault(f"{bits:.2f}", []).append((variant, increase))

    most = max(len(column) for column in columns.values())
    height = _BOTTOM + max(_HEIGHT, _LINE * (most + 1)) + _TOP
    figure = Figure(figsize=(1, height / 72), dpi=72)  # a pixel is a point
    figure.subplots_adjust(bottom=_BOTTOM / height, top=1 - _TOP / height)
    axes = figure.add_subplot()
    _scale_increases(axes, [increase for _, _, increase in points], limit)

    ticks, end = [], 0.0
    for column in columns.values():
        ticks.append(end + 2 * _STEP)
        end = _draw_column(axes, column, ticks[-1], methods)
    axes.set_xlim(0, end)
    axes.set_xticks(ticks, columns, fontsize=_FONT)
    axes.set_xlabel("bits per weight (in order, not to scale)", fontsize=_FONT)
    width = _LEFT + end + _RIGHT
    figure.set_figwidth(width / 72)
    figure.subplots_adjust(left=_LEFT / width, right=1 - _RIGHT / width)
    return figure


def svg(figure: Figure, name: str) -> str:
    """A figure as an element of a page: the same bytes each time, text as text, the page's own
    colours where the page sets them. Its ids begin with `name`, so a page may hold several."""
    settings = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "font.sans-serif": ["DejaVu Sans"],  # matplotlib's own: the same on every machine
    }
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    stream = io.StringIO()
    with rc_context(settings):
        figure.savefig(stream, format="svg", metadata=nothing, transparent=True)
    text = stream.getvalue()
    return _IDS.sub(rf"\g<1>{name}-", text[text.index("<svg") :])


def _method(variant: str) -> str:
    return variant.split("-")[0]


def _label(variant: str) -> str:
    text = " ".join(variant.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _scale_increases(axes: Axes, increases: Sequence[float], limit: float | None) -> None:
    """The vertical axis: linear, or logarithmic away from 0 where one would flatten the others."""
    sizes = [abs(value) for value in (*increases, limit) if value]
    if sizes and max(sizes) > _FLATTENED * median(sizes):
        axes.set_yscale("symlog", linthresh=2 * median(sizes), linscale=4)
    axes.update_datalim([(0, value) for value in (*increases, 0, limit or 0)])
    axes.margins(y=0.06)
    axes.autoscale_view(scalex=False)
    axes.set_autoscaley_on(False)  # labels are placed on this scale
    axes.yaxis.set_major_formatter("{x:+g}")
    axes.set_title("perplexity increase", loc="left", fontsize=_FONT)
    axes.tick_params(color=_GREY, labelsize=_FONT)
    axes.spines[:].set_color(_GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GREY, alpha=0.2)
    axes.axhline(0, color=_GREY, linewidth=1)
    if limit is not None:
        axes.axhline(limit, color=_GREY, linewidth=1, linestyle="--")
        axes.annotate(
            f"gate limit\n{limit:g}",
            (1, limit),
            (4, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=_FONT,
        )


def _draw_column(
    axes: Axes, column: Sequence[tuple[str, float]], first: float, methods: Sequence[str]
) -> float:
    """Markers from `first` on, and to their right a list of labels; where the column ends."""
    heights = axes.transData.transform([(0, increase) for _, increase in column])[:, 1].tolist()
    bottom, top = axes.get_window_extent().intervaly
    levels = spread(heights, _LINE, bottom + _LINE / 2, top - _LINE / 2)
    places = [first + step * _STEP for step in _sidesteps(heights)]
    labels = max(places) + 3 * _STEP
    names = [_label(variant) for variant, _ in column]
    for (variant, increase), name, place, height, level in zip(
        column, names, places, heights, levels, strict=True
    ):
        marker, colour = _METHODS[methods.index(_method(variant)) % len(_METHODS)]
        axes.plot(place, increase, marker, color=colour, markersize=_MARKER, zorder=3)
        axes.annotate(
            name,
            (place, increase),
            (labels - place, level - height),
            textcoords="offset points",
            va="center",
            fontsize=_FONT,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.6, "relpos": (0, 0.5)},
        )
    return labels + _CHARACTER * max(map(len, names)) + 2 * _STEP


def _sidesteps(heights: Sequence[float]) -> list[int]:
    """How many steps to the right each has to stand, so that none touch; heights ascend."""
    taken: list[tuple[int, float]] = []
    for height in heights:
        near = {step for step, other in taken if height - other < _MARKER}
        taken.append((next(step for step in count() if step not in near), height))
    return [step for step, _ in taken]


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Positions at least `apart` from each other between `low` and `high`, nearest to those wanted,
    which ascend: isotonic regression by pooling adjacent violators."""
    pools: list[tuple[float, int]] = []  # sum and count
    for row, position in enumerate(wanted):
        total, size = position - row * apart, 1
        while pools and pools[-1][0] / pools[-1][1] >= total / size:
            total, size = total + pools[-1][0], size + pools.pop()[1]
        pools.append((total, size))
    free = [total / size for total, size in pools for _ in range(size)]
    last = high - (len(wanted) - 1) * apart
    return [min(max(place, low), last) + row * apart for row, place in enumerate(free)]
