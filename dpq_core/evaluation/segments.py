"""A chunk cut for a block: packs of tokens that run together, spans that attend together.

A pack goes through a block's linears as one sequence [1, tokens]: nothing is padded. Its attention
goes span by span. All queries of a span have the same tokens before the span (the ancestors of its
first), so one product with their keys and the span's own serves all of them, masked by

    q sees k  ⇔  k ≤ q < end[k]  and  position[q] − position[k] < window, where a layer has one

Small trees share a span, whose mask is then block-diagonal; a long sequence is cut into spans, each
of which sees those before it. Keys and values that later packs need are carried on to them, and no
longer than for a block.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpq_core.evaluation.forest import Chunk

PACK = 1_024  # tokens
SPAN = 128  # queries


@dataclass(frozen=True, eq=False)
class Span:
    """Queries [start, stop) of a pack, and the keys that they see, of those carried to the pack and
    then its own; a slice where these lie together."""

    start: int
    stop: int
    keys: slice | Tensor
    seen: Tensor  # [queries, keys] bool: k ≤ q < end[k]
    positions: tuple[Tensor, Tensor]  # [queries], [keys] int64: of both in their sequences
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """[queries, keys] bool, of a layer with this window; None: plainly causal. Kept."""
        if window not in self.masks:
            of_query, of_key = self.positions
            near = None if window is None else of_query[:, None] - of_key < window
            seen = self.seen if near is None else self.seen & near
            plain = torch.equal(seen, torch.ones_like(seen).tril())  # needs as many keys as queries
            self.masks[window] = None if plain and len(seen) == seen.shape[1] else seen
        return self.masks[window]


@dataclass(frozen=True, eq=False)
class Pack:
    """Tokens [start, stop) of a chunk. kept: of the keys carried to the pack and then its own,
    those that are carried on."""

    start: int
    stop: int
    spans: list[Span]
    kept: Tensor  # int64


def packs_of(
    chunk: Chunk, device: torch.device | str = "cpu", tokens: int = PACK, queries: int = SPAN
) -> list[Pack]:
    """Packs of `tokens` (of a span at least), in the order in which they run."""
    cuts = _cuts(chunk, queries)
    packs, carried = list[Pack](), torch.empty(0, dtype=torch.int64)
    first = 0
    for number, stop in enumerate(cuts):
        if (number + 1 < len(cuts) and cuts[number + 1] - cuts[first] <= tokens) or number == first:
            continue
        start = cuts[first]
        places = torch.cat([carried, torch.arange(start, stop)])
        bounds = zip(cuts[first:number], cuts[first + 1 : number + 1], strict=True)
        spans = [_span(chunk, places, start, *each, device) for each in bounds]
        kept = (chunk.ends[places] > stop).nonzero().flatten()
        packs.append(Pack(start, stop, spans, kept.to(device)))
        carried, first = places[kept], number
    return packs


def _span(
    chunk: Chunk, places: Tensor, pack: int, start: int, stop: int, device: torch.device | str
) -> Span:
    """places: in the chunk, of the keys carried to the pack and its own."""
    own = (places >= start) & (places < stop)
    index = (own | ((places < start) & (chunk.ends[places] > start))).nonzero().flatten()
    keys, queries = places[index], torch.arange(start, stop)
    seen = (keys <= queries[:, None]) & (queries[:, None] < chunk.ends[keys])
    positions = chunk.positions[queries].to(device), chunk.positions[keys].to(device)
    first, last = int(index[0]), int(index[-1])
    together = last + 1 - first == len(index)
    return Span(
        start - pack,
        stop - pack,
        slice(first, last + 1) if together else index.to(device),
        seen.to(device),
        positions,
    )


def _cuts(chunk: Chunk, queries: int) -> list[int]:
    """Where spans begin, and the end. A span ends before the tokens that follow its first's nearest
    ancestor do; it is cut where few tokens are seen across the cut."""
    ends, positions = chunk.ends.tolist(), chunk.positions.tolist()
    cuts, ancestors = [0], list[int]()  # ends of the ancestors of the token at the last cut
    while cuts[-1] < len(chunk):
        start = cuts[-1]
        limit = min(start + queries, ancestors[-1] if ancestors else len(chunk))
        cut = limit
        if limit < len(chunk) and positions[limit]:
            turns = [
                place
                for place in range(limit, start + (limit - start) // 2, -1)
                if positions[place] <= positions[place - 1]
            ]
            cut = min(turns, key=positions.__getitem__, default=limit)
        ancestors += ends[start:cut]
        ancestors = [end for end in ancestors if end > cut]
        cuts.append(cut)
    return cuts
