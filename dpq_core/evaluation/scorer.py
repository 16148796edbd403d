"""Log-likelihoods of chunks by a model, block by block.

All chunks that a worker has in hand go through a block before the next one is read. What a chunk
scores depends on the chunk and the model alone: neither on the chunks beside it nor on who computes
it. Memory: one block (all of a resident model), a pack's activations, and the hidden states of the
chunks in hand: `dpq_core.evaluation.room`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpq_core.evaluation.forest import Chunk
from dpq_core.evaluation.head import Tiles, head_tiles, predicted
from dpq_core.evaluation.subject import Subject
from dpq_core.evaluation.walk import packs_walk, rows_walk
from dpq_core.model.finite import not_finite


@dataclass(frozen=True, eq=False)
class ChunkScores:
    """The scores of a chunk's requests. requests: [n] int64, ascending. sums: [n] float64:
    log-likelihoods of their predictions in this chunk. greedy: [n] bool: each target was the most
    likely piece. computed: tokens that went through each block."""

    requests: Tensor
    sums: Tensor
    greedy: Tensor
    computed: int


@dataclass(frozen=True, eq=False)
class LastStates:
    """Where a chunk ends in the last block: the tokens that predict, [n] int64 ascending, and their
    hidden states after the last block, [n, hidden] in the model's type; tokens that went through
    each block."""

    places: Tensor
    hidden: Tensor
    computed: int

    def rows(self, chunk: Chunk) -> Tensor:
        """[predictions] int64: the row of `hidden` that each of the chunk's predictions is from."""
        return torch.searchsorted(self.places, chunk.places)


def last_states(
    subject: Subject, chunks: Sequence[Chunk], on_block: Callable[[], None] = lambda: None
) -> list[LastStates]:
    """The last hidden states of each chunk. `on_block` is called after each block.

    Raises:
        NotFiniteError: a model in 16 bits overflows. A quantized one's NaN is its verdict.
    """
    stream = subject.stream
    made = rows_walk if subject.unshared else packs_walk
    walks = [made(stream, chunk) for chunk in chunks]
    with torch.no_grad():
        with stream.embedding(remembered=not subject.unshared) as begun:
            for walk in walks:
                walk.begin(begun)
        for index in range(stream.block_count):
            with subject.block(index):
                for walk in walks:
                    walk.advance()
                    if not subject.quantized and not walk.finite:
                        raise not_finite(stream.block_name(index), stream.dtype)
            on_block()
    found = []
    for walk in walks:
        places = walk.chunk.places.unique()
        found.append(LastStates(places, walk.states()[places].cpu(), walk.computed))
        walk.batches.clear()
    return found


def score(
    subject: Subject, chunks: Sequence[Chunk], on_block: Callable[[], None] = lambda: None
) -> list[ChunkScores]:
    """Scores of each chunk."""
    states = last_states(subject, chunks, on_block)
    with head_tiles(subject.stream) as tiles:
        return [scores_of(tiles, *each) for each in zip(chunks, states, strict=True)]


@torch.no_grad()
def scores_of(tiles: Tiles, chunk: Chunk, states: LastStates) -> ChunkScores:
    """A chunk's scores from its last hidden states. tiles: of the model's head."""
    logs, likely = predicted(tiles, states.hidden, states.rows(chunk), chunk.targets)
    requests, own = chunk.requests.unique(return_inverse=True)
    sums = torch.zeros(len(requests), dtype=torch.float64).index_add(0, own, logs)
    missed = torch.zeros(len(requests), dtype=torch.int64).index_add(0, own, (~likely).long())
    return ChunkScores(requests, sums, missed == 0, states.computed)


def answers(scores: Iterable[ChunkScores], requests: int) -> list[tuple[float, bool]]:
    """Log-likelihood and greedy flag of each request, from its chunks in order.

    Raises:
        ValueError: a request that no chunk has scored.
    """
    sums = torch.zeros(requests, dtype=torch.float64)
    greedy, seen = torch.ones(requests, dtype=torch.bool), torch.zeros(requests, dtype=torch.bool)
    for each in scores:
        sums[each.requests] += each.sums
        greedy[each.requests] &= each.greedy
        seen[each.requests] = True
    if not seen.all():
        raise ValueError(
            f"request {int((~seen).nonzero()[0])} of {requests} is in no chunk that was scored:"
            " give the scores of all chunks of the suite"
        )
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))
