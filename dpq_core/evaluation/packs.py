"""A chunk cut for a block: packs of tokens that run together.

A pack goes through a block's linears as one sequence [1, tokens]: nothing is padded, and all packs
but a chunk's last have one shape, for which libraries make and keep one kernel. In attention

    q sees k  ⇔  k ≤ q < end[k]  and  position[q] − position[k] < window, where a layer has one

On a CPU a kernel is told the keys of each query (`Pack.seen`), elsewhere a pack is cut into spans
(`dpq_core.evaluation.spans`). Keys and values that later packs need are carried on to them, and no
longer than for a block.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpq_core.evaluation.forest import Chunk
from dpq_core.evaluation.grain import CPU
from dpq_core.kernels.tree_attention import Seen


@dataclass(frozen=True, eq=False)
class Pack:
    """Tokens [start, stop) of a chunk.

    places: [keys] int64, in the chunk, of the keys carried to the pack and then its own. kept:
    int64, those of them that are carried on.
    """

    chunk: Chunk
    start: int
    stop: int
    places: Tensor
    kept: Tensor
    _seen: dict[int | None, Seen] = field(default_factory=dict)

    def seen(self, window: int | None) -> Seen:
        """By the pack's queries, in a layer with this window; made when it is asked for, and
        kept."""
        if window not in self._seen:
            queries = torch.arange(self.start, self.stop, dtype=torch.int32)
            keys, ends = (x.int()[:, None] for x in (self.places, self.chunk.ends[self.places]))
            seen = (keys <= queries) & (queries < ends)
            if window is not None:
                positions = self.chunk.positions.int()
                seen &= positions[self.start : self.stop] - positions[self.places, None] < window
            self._seen[window] = Seen.of(seen.numpy())
        return self._seen[window]


def packs_of(chunk: Chunk, tokens: int = CPU.pack) -> list[Pack]:
    """Packs of `tokens`, the last of what is left, in the order in which they run."""
    packs, carried = list[Pack](), torch.empty(0, dtype=torch.int64)
    for start in range(0, len(chunk), tokens):
        stop = min(start + tokens, len(chunk))
        places = torch.cat([carried, torch.arange(start, stop)])
        kept = (chunk.ends[places] > stop).nonzero().flatten()
        packs.append(Pack(chunk, start, stop, places, kept))
        carried = places[kept]
    return packs
