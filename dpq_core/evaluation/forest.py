"""Sequences that are scored, as trees of shared prefixes, cut into chunks.

The choices of a question share its context, the questions of a subject its examples: each token is
computed once for all sequences that begin with it. A tree is written down in preorder, a token a
node, and two numbers a token say all of its shape:

    position[k]   tokens before k in its sequence
    end[k]        where the tokens that follow k, in any sequence, end
    q sees k   ⇔  k ≤ q < end[k]

A `Chunk` is the unit of work: plain data, whose scores depend on nothing but a model. Chunks are
filled in order up to `CHUNK` tokens, whoever computes them, so a score has the same bits for any
number of workers. Where a tree goes on in the next chunk, it begins there at its root again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

CHUNK = 16_384  # tokens
WORTH = 16  # tokens: shorter common beginnings (a begin-of-text token) do not tie trees together


@dataclass(frozen=True)
class Asked:
    """A sequence of a request: its last `scored` tokens are predicted, each from those before.

    request: its number among those that are asked together; rolling windows of a text share one.
    """

    ids: tuple[int, ...]
    scored: int
    request: int

    def __post_init__(self) -> None:
        if not 0 < self.scored < len(self.ids):
            raise ValueError(
                f"a sequence of {len(self.ids)} tokens cannot have {self.scored} of them scored:"
                " at least one, and all but the first at most"
            )


@dataclass(frozen=True, eq=False)
class Chunk:
    """Trees in preorder, and what is asked of them. All int64.

    ids, positions, ends: [tokens], see above. places, targets, requests: [predictions]: the token
    whose hidden state predicts, the token that is predicted, the request that this is part of.
    """

    ids: Tensor
    positions: Tensor
    ends: Tensor
    places: Tensor
    targets: Tensor
    requests: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def digest(self) -> str:
        """Of all of it, the requests that its sums are for among them."""
        content = hashlib.sha256()
        for field in fields(self):
            content.update(getattr(self, field.name).numpy().tobytes() + b"|")
        return content.hexdigest()


@dataclass
class _Growing:
    """A chunk so far. path: the places of the last sequence's tokens."""

    ids: list[int]
    positions: list[int]
    ends: list[int]
    predictions: list[tuple[int, int, int]]  # place, target, request
    path: list[int]

    @classmethod
    def empty(cls) -> "_Growing":
        return cls([], [], [], [], [])

    def add(self, asked: Asked, shared: int) -> None:
        """A sequence whose first `shared` tokens are those of the last one."""
        self._close(shared)
        inputs = asked.ids[:-1]
        self.path += range(len(self.ids), len(self.ids) + len(inputs) - shared)
        self.ids += inputs[shared:]
        self.positions += range(shared, len(inputs))
        self.ends += [0] * (len(inputs) - shared)
        for position in range(len(inputs) - asked.scored, len(inputs)):
            target = asked.ids[position + 1]
            self.predictions.append((self.path[position], target, asked.request))

    def finished(self) -> Chunk:
        self._close(0)
        predictions = torch.tensor(self.predictions, dtype=torch.int64).T.contiguous()
        return Chunk(*map(torch.tensor, (self.ids, self.positions, self.ends)), *predictions)

    def _close(self, shared: int) -> None:
        for place in self.path[shared:]:
            self.ends[place] = len(self.ids)
        del self.path[shared:]


def chunks_of(asked: Sequence[Asked], tokens: int = CHUNK) -> Iterator[Chunk]:
    """Chunks of up to so many tokens (a longer sequence is one alone), in a fixed order."""
    growing, last = _Growing.empty(), tuple[int, ...]()
    for each in sorted(asked, key=lambda one: (one.ids[:-1], one.request, one.ids[-1])):
        inputs = each.ids[:-1]
        shared = _common(last, inputs)
        if shared < min(WORTH, len(inputs)):
            shared = 0
        if growing.ids and len(growing.ids) + len(inputs) - shared > tokens:
            yield growing.finished()
            growing, shared = _Growing.empty(), 0
        growing.add(each, shared)
        last = inputs
    if growing.ids:
        yield growing.finished()


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for number, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return number
    return min(len(left), len(right))


def sequences_of(chunk: Chunk) -> list[list[int]]:
    """The places of each sequence that is no other's beginning: the trees' leaves, from their
    roots."""
    ends, positions = chunk.ends.tolist(), chunk.positions.tolist()
    found, path = list[list[int]](), list[int]()
    for place, (position, end) in enumerate(zip(positions, ends, strict=True)):
        path = [*path[:position], place] if position < len(path) else path
        if position == len(path):
            path.append(place)
        if end == place + 1:
            found.append(list(path))
    return found
