"""How far two models are apart over the text of perplexity: token by token, and where in the text.

A window is what is resampled and what is of one half or the other (`dpq_core.verdict`), so tokens
stay with their window. A spot is a place where the two are far apart, with the tokens around it:
what a reader looks at. Tokens near a worse spot are not told again.

On disk: Parquet, a row a window (`window`, `nats`, `agree`); version and spots in its metadata.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpq_core.evaluation.divergence import Divergence
from dpq_core.evaluation.perplexity import window_names

DIVERGENCE = "divergence"  # its name among what is measured of a checkpoint
FILE = "divergence.parquet"

_VERSION = "1"
_SPOTS = 64  # that are kept: of those of one half still more than are shown
_BEFORE, _AFTER = 24, 12  # tokens around a spot
_NEAR = 8  # tokens, within which the worst alone is told


@dataclass(frozen=True)
class Spot:
    """A token whose prediction is far from the 16-bit model's. position: its place in the window.
    nats: KL of its prediction. agree: both thought the same most likely. before, token, after: the
    text; the token's number alone where there was no tokenizer."""

    window: str
    position: int
    nats: float
    agree: bool
    before: str
    token: str
    after: str


@dataclass(frozen=True, eq=False)
class TextDivergence:
    """windows: SHA-256 of the tokens of each, as perplexity names them. spots: the worst first."""

    windows: list[str]
    nats: NDArray[np.float32]  # [windows, length - 1], KL(p ‖ q) of each predicted token
    agree: NDArray[np.bool_]  # [windows, length - 1]
    spots: tuple[Spot, ...]

    def __post_init__(self) -> None:
        if self.nats.shape != self.agree.shape or len(self.nats) != len(self.windows):
            raise ValueError(
                f"{len(self.windows)} windows, nats {list(self.nats.shape)} and agree"
                f" {list(self.agree.shape)} are no divergence: all are by window and token"
            )

    def some(self, places: Sequence[int]) -> "TextDivergence":
        """Of these windows alone."""
        names = [self.windows[place] for place in places]
        kept = set(names)
        spots = tuple(spot for spot in self.spots if spot.window in kept)
        chosen = list(places)
        return TextDivergence(names, self.nats[chosen], self.agree[chosen], spots)


def text_divergence(
    found: Divergence,  # [windows × (length − 1)], in the order of the windows' predictions
    windows: Tensor,  # [windows, length] int64
    tokenizer: Any | None = None,
) -> TextDivergence:
    """The divergence of perplexity's windows by window, with its worst spots as text.

    Raises:
        ValueError: not an entry for each predicted token.
    """
    count, length = windows.shape
    if len(found.nats) != count * (length - 1):
        raise ValueError(
            f"the divergence of {len(found.nats)} tokens, and {count} windows of {length} have"
            f" {count * (length - 1)} predictions"
        )
    nats = found.nats.reshape(count, -1).to(torch.float32).numpy()
    agree = found.agree.reshape(count, -1).numpy().astype(bool)
    names = window_names(windows)
    spots = [
        Spot(
            names[row],
            place + 1,
            float(nats[row, place]),
            bool(agree[row, place]),
            *_around(windows[row].tolist(), place + 1, tokenizer),
        )
        for row, place in _worst(nats)
    ]
    return TextDivergence(names, nats, agree, tuple(spots))


def save_divergence(found: TextDivergence, path: Path) -> None:
    """Write as Parquet."""
    import pyarrow
    from pyarrow import parquet

    columns = {
        "window": pyarrow.array(found.windows, pyarrow.string()),
        "nats": pyarrow.array(list(found.nats), pyarrow.list_(pyarrow.float32())),
        "agree": pyarrow.array(list(found.agree), pyarrow.list_(pyarrow.bool_())),
    }
    spots = json.dumps([asdict(spot) for spot in found.spots])
    metadata = {"version": _VERSION, "spots": spots}
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)


def load_divergence(path: Path) -> TextDivergence:
    """Inverse of `save_divergence`.

    Raises:
        ValueError: a version that is not known.
    """
    from pyarrow import parquet

    table = parquet.read_table(path)
    metadata = table.schema.metadata
    if (version := metadata[b"version"].decode()) != _VERSION:
        raise ValueError(f"{path}: version {version} of a divergence; known is {_VERSION}")
    rows = table.to_pydict()
    return TextDivergence(
        rows["window"],
        np.array(rows["nats"], np.float32),
        np.array(rows["agree"], bool),
        tuple(Spot(**spot) for spot in json.loads(metadata[b"spots"])),
    )


def _worst(nats: NDArray[np.float32]) -> Iterator[tuple[int, int]]:
    """Window and place of the largest, of those near one another the largest alone. What is not
    finite is the worst."""
    flat = np.where(np.isfinite(nats), nats, np.inf).ravel()
    told: dict[int, list[int]] = {}
    for number in np.argsort(-flat, kind="stable"):
        row, place = divmod(int(number), nats.shape[1])
        near = told.setdefault(row, [])
        if any(abs(place - other) <= _NEAR for other in near):
            continue
        near.append(place)
        yield row, place
        if sum(map(len, told.values())) == _SPOTS:
            return


def _around(tokens: list[int], place: int, tokenizer: Any | None) -> tuple[str, str, str]:
    """The text before, of and after a token. Pieces that stand alone may lose their space, so each
    is what its tokens add to the text before."""
    if tokenizer is None:
        return "", f"token {tokens[place]}", ""
    start = max(0, place - _BEFORE)
    ends = (place, place + 1, place + 1 + _AFTER)
    before, until, whole = (tokenizer.decode(tokens[start:end]) for end in ends)
    return before, _added(before, until), _added(until, whole)


def _added(before: str, after: str) -> str:
    """What a longer text has more; where half a character became a whole one, from there on."""
    same = 0
    for one, other in zip(before, after, strict=False):
        if one != other:
            break
        same += 1
    return after[same:]
