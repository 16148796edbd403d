"""The output head in tiles of tokens and of the vocabulary: no logits [tokens, vocabulary].

The model's own forward runs from its last block on, with some rows of the head's weight in the
place of all (a quantized head's are decoded once, and have scales beside them): what it does to
logits (soft caps, scales) is done to those of a tile. So

    log p(target) = logit(target) − log Σ exp(logit)

needs a running sum a token: of a tile in the logits' type, of the tiles in float64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dpq_core.evaluation.grain import grain_on
from dpq_core.model.blocks import BlockStream

ROWS, COLUMNS = 2_048, 8_192  # of a tile, at most: tokens, pieces of the vocabulary


@dataclass(frozen=True)
class Tiles:
    """rows: tokens of a tile. logits: of hidden states [rows, hidden], the first piece of each
    tile, and its logits [rows, pieces] in FP32, on the model's device."""

    rows: int
    logits: Callable[[Tensor], Iterator[tuple[int, Tensor]]]


@dataclass(frozen=True, eq=False)
class Sample:
    """Some pieces of the vocabulary for all of them, see `dpq_core.evaluation.sampled_pieces`.
    pieces: [sampled] int64, ascending. weights: [sampled] fp32, pieces that each stands for."""

    pieces: Tensor
    weights: Tensor


@contextmanager
def head_tiles(
    stream: BlockStream, columns: int = COLUMNS, sample: Sample | None = None
) -> Iterator[Tiles]:
    """The head with its weights, while this lasts. Of a sample the logits are log weights more, so
    that sums of their exponentials are those of all pieces; the n-th is of the n-th that it has."""
    with stream.head() as logits_of:
        path = stream.anatomy.parts.head
        head = stream.model.get_submodule(path)
        tensors = (*head.parameters(), *head.buffers())
        # Their data are exchanged, not the parameters: see `empty.building`.
        stored = [(each, each.data) for each in tensors if each.ndim]
        whole, pieces, more = stored, int(head.out_features), None
        if sample is not None:
            chosen = sample.pieces.to(stream.device)
            whole = [(each, data.index_select(0, chosen)) for each, data in stored]
            pieces, more = len(chosen), sample.weights.log().to(stream.device)

        def logits(states: Tensor) -> Iterator[tuple[int, Tensor]]:
            try:
                for first in range(0, pieces, columns):
                    stream.model.set_submodule(path, head)  # another one may be open beside it
                    for parameter, data in whole:
                        parameter.data = data[first : first + columns]
                    # A token a row: all at the first position, whatever a model adds by it.
                    tile = logits_of(states[:, None])[:, 0].float()
                    yield first, tile if more is None else tile + more[first : first + columns]
            finally:
                for parameter, data in stored:
                    parameter.data = data

        most = grain_on(stream.device).tile // min(pieces, columns)
        yield Tiles(min(ROWS, most), logits)


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a model predicts after tokens, [tokens]: log Σ exp(logit) in float64, the most likely
    piece."""

    log_sums: Tensor
    best: Tensor


class RunningSums:
    """log Σ exp(logit) and the first of the largest logits, tile after tile."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    def add(self, first: int, logits: Tensor) -> None:
        """logits: [tokens, pieces] fp32 or float64, of the pieces from `first` on."""
        largest, best = logits.max(-1)
        sums = logits.logsumexp(-1).double()
        if self._largest is None:
            self._largest, self._best, self._sums = largest, best + first, sums
            return
        nan = largest.isnan() & ~self._largest.isnan()
        higher = (largest > self._largest) | nan
        self._best = torch.where(higher, best + first, self._best)
        self._largest = torch.where(higher, largest, self._largest)
        self._sums = torch.logaddexp(self._sums, sums)

    def finished(self) -> Predicted:
        return Predicted(self._sums, self._best)


def predicted(
    tiles: Tiles,
    states: Tensor,  # [tokens, hidden]
    rows: Tensor,  # [targets] int64: of `states`
    targets: Tensor,  # [targets] int64
) -> tuple[Tensor, Tensor]:
    """For each target: its log-probability, float64, and whether it is the most likely piece."""
    logs = torch.empty(len(targets), dtype=torch.float64)
    likely = torch.empty(len(targets), dtype=torch.bool)
    for start in range(0, len(states), tiles.rows):
        mine = ((rows >= start) & (rows < start + tiles.rows)).nonzero().flatten()
        own, wanted = rows[mine] - start, targets[mine]
        sums, logits = RunningSums(), torch.full((len(mine),), torch.nan, dtype=torch.float64)
        for first, tile in tiles.logits(states[start : start + tiles.rows]):
            sums.add(first, tile)
            here = (wanted >= first) & (wanted < first + tile.shape[1])
            at = own[here].to(tile.device), (wanted[here] - first).to(tile.device)
            logits[here] = tile[at].double().cpu()
        found = sums.finished()
        logs[mine] = logits - found.log_sums.cpu()[own]
        likely[mine] = found.best.cpu()[own] == wanted
    return logs, likely
