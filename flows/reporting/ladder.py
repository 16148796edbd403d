"""The ladder as people and programs read it: records, Markdown, and a page with a plot.

A number becomes text in one place, `cells`, which the terminal, the Markdown and the page share;
programs get the numbers themselves (`as_records`). The page stands alone: no script, nothing
fetched. Jinja escapes it, all but the plot, which matplotlib escapes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from markupsafe import Markup

from dpq_core.verdict.pairing import CONFIDENCE
from flows.reporting.html import rendered
from tasks.support.markdown import markdown_table

_ABSENT = "–"
# What Markdown, or HTML inside it, would act on; underscores inside a word are safe.
_SPECIAL = re.compile(r"[\\`*\[\]<>|&$~]|(?<![^\W_])_|_(?![^\W_])")


@dataclass(frozen=True)
class Row:
    """One variant of a model. A number that is not known is None, and `error` says why."""

    variant: str
    perplexity: float | None = None
    increase: float | None = None  # of perplexity, over the 16-bit model
    interval: tuple[float, float] | None = None  # of the increase, paired by window
    bits_per_weight: float | None = None
    layer_error: float | None = None  # relative output error, mean over the layers
    accuracy: Mapping[str, float] = field(default_factory=dict)  # by metric, percent
    distances: Mapping[str, float] = field(default_factory=dict)  # of DISTANCES, where measured
    gates: str | None = None  # the worst of the words that the recipe's gates say
    error: str | None = None

    def __post_init__(self) -> None:
        if self.perplexity is None and not self.error:
            raise ValueError(f"{self.variant}: a row without perplexity needs an error")


DISTANCES = {  # by metric: title, and how it is shown
    "divergence": ("KL, nats", ".5f"),
    "top1_agreement": ("top-1", ".4f"),
    "flips": ("flips, %", ".2f"),
}


def columns(rows: Sequence[Row]) -> list[str]:
    """Titles: one for every metric that any row has."""
    distances = [DISTANCES[name][0] for name in _distances(rows)]
    interval = f"{100 * CONFIDENCE:g} % interval"
    numbers = ["perplexity", "increase", interval, "bits/w", "layer error"]
    return ["variant", *numbers, *distances, *_gates(rows), *_metrics(rows)]


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """One of `rows` as text, a cell for each of `columns(rows)`."""
    ends = [_shown(end, "+.4f") for end in row.interval or ()]
    return [
        row.variant,
        "failed" if row.perplexity is None else _shown(row.perplexity, ".4f"),
        _shown(row.increase, "+.4f"),
        " … ".join(ends) or _ABSENT,
        _shown(row.bits_per_weight, ".2f"),
        _shown(row.layer_error, ".5f"),
        *(_shown(row.distances.get(name), DISTANCES[name][1]) for name in _distances(rows)),
        *((row.gates or _ABSENT) for _ in _gates(rows)),
        *(_shown(row.accuracy.get(metric), ".2f") for metric in _metrics(rows)),
    ]


def as_records(rows: Sequence[Row]) -> list[dict[str, str | float | None]]:
    """Flat, all with the same keys; None for what is missing and, as JSON has none, not finite."""
    records = []
    for row in rows:
        low, high = row.interval or (None, None)
        numbers = {
            "perplexity": row.perplexity,
            "increase": row.increase,
            "interval_low": low,
            "interval_high": high,
            "bits_per_weight": row.bits_per_weight,
            "layer_error": row.layer_error,
            **{name: row.distances.get(name) for name in _distances(rows)},
            **{metric: row.accuracy.get(metric) for metric in _metrics(rows)},
        }
        finite = {name: value if _finite(value) else None for name, value in numbers.items()}
        said = {"gates": row.gates, "error": row.error}
        records.append({"variant": row.variant, **finite, **said})
    return records


def markdown(rows: Sequence[Row]) -> str:
    """A GitHub-flavoured table, and below it why numbers are missing."""
    titles, *table = [
        [_literal(text) for text in line]
        for line in (columns(rows), *(cells(row, rows) for row in rows))
    ]
    reasons = [f"- {_literal(row.variant)}: {_literal(row.error)}" for row in rows if row.error]
    return "\n".join([markdown_table(titles, table), "", *reasons]).rstrip() + "\n"


def html(
    rows: Sequence[Row], title: str, about: Mapping[str, str], limit: float | None = None
) -> str:
    """A page: what `about` lists, the plot, the table, and why numbers are missing.

    `limit` is the gate's, of the increase.
    """
    from tasks.support.figures import ladder_figure, svg  # matplotlib: a second

    points = [
        (row.variant, row.bits_per_weight, row.increase)
        for row in rows
        if _finite(row.bits_per_weight) and _finite(row.increase)
    ]
    return rendered(
        "ladder.html",
        title=title,
        about=about,
        plot=Markup(svg(ladder_figure(points, limit), "ladder")) if len(points) > 1 else None,
        lowest=_lowest(points[1:]),
        missing=len(rows) - len(points),
        columns=columns(rows),
        table=[cells(row, rows) for row in rows],
        reasons=[(row.variant, row.error) for row in rows if row.error],
    )


def _metrics(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(metric for row in rows for metric in row.accuracy))


def _distances(rows: Sequence[Row]) -> list[str]:
    return [name for name in DISTANCES if any(name in row.distances for row in rows)]


def _gates(rows: Sequence[Row]) -> list[str]:
    """The title of the column, where there is one."""
    return ["gates"] if any(row.gates for row in rows) else []


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _shown(value: float | None, spec: str) -> str:
    return _ABSENT if value is None else format(value, spec)


def _literal(text: str) -> str:
    """On one line, and nothing but text to Markdown."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))


def _lowest(points: Sequence[tuple[str, float, float]]) -> list[tuple[str, str, str]]:
    """Bits per weight, variant and increase of the best at each number of bits, as shown."""
    best: dict[str, tuple[str, float]] = {}
    for variant, bits, increase in sorted(points, key=lambda point: (round(point[1], 2), point[2])):
        best.setdefault(f"{bits:.2f}", (variant, increase))
    return [(bits, name, _shown(increase, "+.4f")) for bits, (name, increase) in best.items()]
