"""Records as the cells of a page's tables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flows.reporting.prefect_artifacts import number
from infra.registry.history import PastVersion

_ALIGNED = re.compile(r"[+−]?[\d.,]+( [kMGT]?B)?|missing|–|not measured")
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first of a row names it. cards: on a phone a card a row, where
    every column matters, and not a table that scrolls."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    cards: bool = False

    @property
    def numeric(self) -> list[bool]:
        """By column, whether it is aligned as numbers are."""
        cells = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        return [all(_ALIGNED.fullmatch(cell) for cell in column) for column in cells]


def table(
    caption: str,
    rows: Sequence[Mapping[str, str]],
    titles: Mapping[str, str] | None = None,
    cards: bool = False,
) -> Table:
    """Records as a table; `titles` chooses and names columns, else those of the first row."""
    known = titles or {key: key for key in (rows[0] if rows else {})}
    keys = [key for key in known if not rows or key in rows[0]]
    cells = [[row[keys[0]], *(_shown(row[key]) for key in keys[1:])] for row in rows]
    return Table(caption, [known[key] for key in keys], cells, cards)


def _shown(cell: str) -> str:
    """With a minus that a screen reader reads, and an interval in words."""
    return _MINUS.sub("−", cell).replace(" … ", " to ")


def measured(past: PastVersion, key: str, spec: str) -> str:
    return number(past.metrics[key], spec) if key in past.metrics else "not measured"


def bits(bytes_per_weight: float | None) -> str:
    return "–" if bytes_per_weight is None else number(8 * bytes_per_weight, ".2f")


def or_dash(value: object) -> object:
    return "–" if value is None else value
