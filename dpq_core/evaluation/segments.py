"""A chunk cut for a block: packs of tokens that run together, spans that attend together.

A pack goes through a block's linears as one sequence [1, tokens]: nothing is padded, and all packs
but a chunk's last have one shape, for which libraries make and keep one kernel. Attention goes span
by span. All queries of a span have the same tokens before the span (the ancestors of its
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
from dpq_core.evaluation.grain import CPU


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


@dataclass(frozen=True, eq=False)
class Pack:
    """Tokens [start, stop) of a chunk. kept: of the keys carried to the pack and then its own,
    those that are carried on."""

    start: int
    stop: int
    spans: list[Span]
    kept: Tensor  # int64


def packs_of(
    chunk: Chunk,
    device: torch.device | str = "cpu",
    tokens: int = CPU.pack,
    queries: int = CPU.span,
) -> list[Pack]:
    """Packs of `tokens`, the last of what is left, in the order in which they run."""
    cuts, texts = _cuts(chunk, tokens, queries), _Texts(device)
    packs, carried = list[Pack](), torch.empty(0, dtype=torch.int64)
    for start in range(0, len(chunk), tokens):
        stop = min(start + tokens, len(chunk))
        places = torch.cat([carried, torch.arange(start, stop)])
        inner = [cut for cut in cuts if start <= cut < stop]
        bounds = zip(inner, [*inner[1:], stop], strict=True)
        spans = [_span(chunk, places, start, *each, texts) for each in bounds]
        kept = (chunk.ends[places] > stop).nonzero().flatten()
        packs.append(Pack(start, stop, spans, kept.to(device)))
        carried = places[kept]
    return packs


@dataclass(frozen=True)
class _Texts:
    """Sights, those of spans of one text alone once: so many queries see so many keys."""

    device: torch.device | str
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


def _span(chunk: Chunk, places: Tensor, pack: int, start: int, stop: int, texts: _Texts) -> Span:
    """places: in the chunk, of the keys carried to the pack and its own."""
    own = (places >= start) & (places < stop)
    index = (own | ((places < start) & (chunk.ends[places] > start))).nonzero().flatten()
    sight = texts.sight(chunk, torch.arange(start, stop), places[index])
    first, last = int(index[0]), int(index[-1])
    together = last + 1 - first == len(index)
    keys = slice(first, last + 1) if together else index.to(texts.device)
    return Span(start - pack, stop - pack, keys, sight)


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
