"""A pack's attention where it is torch's own: spans of queries that attend together.

All queries of a span have the same tokens before the span (the ancestors of its first), so one
product with their keys and the span's own serves all of them, masked. Small trees share a span,
whose mask is then block-diagonal; a long sequence is cut into spans, each of which sees those
before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpq_core.evaluation.forest import Chunk
from dpq_core.evaluation.packs import Pack


@dataclass(frozen=True, eq=False)
class Sight:
    """What queries see of keys. seen: [queries, keys] bool, k ≤ q < end[k]. positions: [queries],
    [keys] int64, of both in their sequences. masks: by window and type; made when they are asked
    for, and kept."""

    seen: Tensor
    positions: tuple[Tensor, Tensor]
    masks: dict[tuple[int | None, torch.dtype], Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[queries, keys], what is added to their products in a layer with this window: 0, or −∞
        where a key is not seen; None: plainly causal."""
        if (window, dtype) not in self.masks:
            of_query, of_key = self.positions
            near = None if window is None else of_query[:, None] - of_key < window
            seen = self.seen if near is None else self.seen & near
            plain = len(seen) == seen.shape[1] and torch.equal(seen, torch.ones_like(seen).tril())
            added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            mask = None if plain else added.masked_fill_(~seen, -torch.inf)
            self.masks[window, dtype] = mask
        return self.masks[window, dtype]


@dataclass(frozen=True, eq=False)
class Span:
    """Queries [start, stop) of a pack, and the keys that they see, of those carried to the pack and
    then its own; a slice where these lie together."""

    start: int
    stop: int
    keys: slice | Tensor
    sight: Sight


def spans_of(
    chunk: Chunk, packs: Sequence[Pack], queries: int, device: torch.device | str = "cpu"
) -> list[list[Span]]:
    """Of each of a chunk's packs, spans of `queries` at most."""
    texts = _Texts(torch.device(device))
    cuts, found = _cuts(chunk, packs[0].stop, queries), list[list[Span]]()
    for pack in packs:
        own = [cut for cut in cuts if pack.start <= cut < pack.stop]
        bounds = zip(own, [*own[1:], pack.stop], strict=True)
        found.append([_span(chunk, pack, *each, texts) for each in bounds])
    return found


@dataclass(frozen=True)
class _Texts:
    """Sights, those of spans of one text alone once: so many queries see so many keys."""

    device: torch.device
    found: dict[tuple[int, int], Sight] = field(default_factory=dict)

    def sight(self, chunk: Chunk, queries: Tensor, keys: Tensor) -> Sight:
        size = len(queries), len(keys)
        alone = torch.equal(chunk.positions[keys], torch.arange(len(keys)))
        if alone and size in self.found:
            return self.found[size]
        of_query, of_key = (chunk.positions[each].to(self.device) for each in (queries, keys))
        ends = chunk.ends[keys].to(self.device)
        keys, queries = keys.to(self.device), queries.to(self.device)[:, None]
        sight = Sight((keys <= queries) & (queries < ends), (of_query, of_key))
        if alone:
            self.found[size] = sight
        return sight


def _span(chunk: Chunk, pack: Pack, start: int, stop: int, texts: _Texts) -> Span:
    """Queries [start, stop) of the chunk."""
    places = pack.places
    own = (places >= start) & (places < stop)
    index = (own | ((places < start) & (chunk.ends[places] > start))).nonzero().flatten()
    sight = texts.sight(chunk, torch.arange(start, stop), places[index])
    first, last = int(index[0]), int(index[-1])
    together = last + 1 - first == len(index)
    keys = slice(first, last + 1) if together else index.to(texts.device)
    return Span(start - pack.start, stop - pack.start, keys, sight)


def _cuts(chunk: Chunk, tokens: int, queries: int) -> list[int]:
    """Where spans begin. A span ends before the tokens that follow its first's nearest ancestor do,
    and with its pack; it is cut where few tokens are seen across the cut."""
    ends, positions = chunk.ends.tolist(), chunk.positions.tolist()
    cuts, ancestors = [0], list[int]()  # ends of the ancestors of the token at the last cut
    while cuts[-1] < len(chunk):
        start = cuts[-1]
        edge = min(start - start % tokens + tokens, len(chunk))
        limit = min(start + queries, edge, ancestors[-1] if ancestors else edge)
        cut = limit
        if limit < edge and positions[limit]:
            turns = [
                place
                for place in range(limit, start + (limit - start) // 2, -1)
                if positions[place] <= positions[place - 1]
            ]
            cut = min(turns, key=positions.__getitem__, default=limit)
        ancestors = [end for end in [*ancestors, *ends[start:cut]] if end > cut]
        cuts.append(cut)
    return cuts[:-1]
