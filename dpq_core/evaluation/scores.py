"""What a model scored on every document (or window) of one suite, and the one number it adds up to.

    accuracy   = 100 · Σ value / Σ weight              value 1 right, 0 wrong; weight 1
    perplexity = exp( Σ value / Σ weight )             value in nats; weight in tokens, or words

The values stay with the result, in the order of the documents and with the documents' names, so
that two models can be compared document by document (`dpq_core.verdict.pairing`). A value that is
NaN (a log-likelihood that was not finite) makes the number NaN: nothing is averaged over.

Of a suite of choices each document keeps which one was picked, and its margin above the next: the
difference of their log-likelihoods, each normalised as the metric does (`acc`: not at all;
`acc_norm`: by the characters of the choice), in nats. Other scores have neither column.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

PERPLEXITY = "perplexity_token"
PERPLEXITY_WORD = "perplexity_word"
AFTER_BOS = "after BOS"  # perplexity_token of windows that begin with the begin-of-text token
PERPLEXITIES = (PERPLEXITY, AFTER_BOS, PERPLEXITY_WORD)
ACCURACIES = ("acc", "acc_norm")

_METADATA = ("metric", "truncated")
_OPTIONAL = ("picks", "margins")


@dataclass(frozen=True)
class Scores:
    """Columns of equal length: one entry a document."""

    metric: str  # one of PERPLEXITIES or ACCURACIES
    documents: list[str]  # SHA-256 of each document, or of a window's tokens
    parts: list[str]  # lm-evaluation-harness task of each: mmlu_anatomy
    groups: list[str]  # label of each's category: mmlu_stem_tasks; "" where there is none
    values: list[float]
    weights: list[float]
    truncated: int = 0  # requests that were cut to the model's window
    picks: list[int] = field(default_factory=list)  # number of the choice, -1: none is the largest
    margins: list[float] = field(default_factory=list)  # nats, of the pick above the next

    def __post_init__(self) -> None:
        lengths = {len(column) for column in self._columns().values()}
        if len(lengths) != 1:
            raise ValueError(f"columns of {sorted(lengths)} entries are no scores")

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def value(self) -> float:
        """Percent, or perplexity; NaN where there is no document."""
        return aggregate(self.metric, math.fsum(self.values), math.fsum(self.weights))

    def _columns(self) -> dict[str, list[str] | list[float] | list[int]]:
        """All that there are: what is optional may be empty."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _METADATA}
        return {name: c for name, c in columns.items() if c or name not in _OPTIONAL}


def aggregate(metric: str, value: float, weight: float) -> float:
    """The number that sums of values and weights stand for."""
    if not weight:
        return math.nan
    if metric in ACCURACIES:
        return 100 * value / weight
    try:
        return math.exp(value / weight)
    except OverflowError:
        return math.inf


def save_scores(scores: Scores, path: Path) -> None:
    """Write as Parquet; what is no column goes into the schema's metadata."""
    import pyarrow
    from pyarrow import parquet

    metadata = {name: str(getattr(scores, name)) for name in _METADATA}
    table = pyarrow.table(scores._columns())
    parquet.write_table(table.replace_schema_metadata(metadata), path)


def load_scores(path: Path) -> Scores:
    """Inverse of `save_scores`."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    return Scores(
        metric=metadata["metric"], truncated=int(metadata["truncated"]), **table.to_pydict()
    )
