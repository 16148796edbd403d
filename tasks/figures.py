"""Plots, as matplotlib figures: drawn for a page, not for a window."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

_MOST_LABELS = 60


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
