"""Rows as a GitHub-flavoured table."""

from collections.abc import Sequence


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """A line a row. names: columns at the left that name a row; all others are numbers."""
    rule = [*["---"] * names, *["--:"] * (len(titles) - names)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, rule, *rows))
