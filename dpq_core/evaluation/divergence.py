"""How far a model's predictions are from another's: over whole distributions, token by token.

    KL(p ‖ q) = Σ_i p_i (log p_i − log q_i)        p of the 16-bit model, q of the candidate; nats

from last hidden states and heads, in tiles of the vocabulary. With logits a and b, and m any number
near the largest a so far,

    KL = [ Σ exp(a_i − m) (a_i − b_i) ] / [ Σ exp(a_i − m) ] − log Σ exp(a_i) + log Σ exp(b_i)

whose sums grow tile by tile. They run in float64: the terms are large and cancel.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpq_core.evaluation.head import Tiles
from dpq_core.kernels.definitions import LEAST
from dpq_core.kernels.dispatch import compare


@dataclass(frozen=True, eq=False)
class Divergence:
    """Token by token, [tokens]. nats: KL(p ‖ q), float64. agree: both have the same most likely
    piece."""

    nats: Tensor
    agree: Tensor


def joined(parts: Iterable[Divergence]) -> Divergence:
    """The divergences of chunks, one after another."""
    found = list(parts)
    return Divergence(torch.cat([p.nats for p in found]), torch.cat([p.agree for p in found]))


def by_request(parts: Iterable[tuple[Tensor, Divergence]]) -> Divergence:
    """The divergences of chunks' predictions in the order of the requests that these are for,
    [predictions] int64; those of a request as they come."""
    found = list(parts)
    order = torch.cat([requests for requests, _ in found]).argsort(stable=True)
    whole = joined(each for _, each in found)
    return Divergence(whole.nats[order], whole.agree[order])


def divergence(
    reference: Tiles,  # `head.head_tiles` of the 16-bit model
    states: Tensor,  # [tokens, hidden], after its last block
    other: Tiles,  # of the candidate
    other_states: Tensor,  # [tokens, hidden] of the same tokens
) -> Divergence:
    """KL of each token.

    Raises:
        ValueError: not the same number of tokens.
    """
    (found,) = divergences(reference, states, [(other, other_states)])
    return found


def divergences(
    reference: Tiles, states: Tensor, others: Sequence[tuple[Tiles, Tensor]]
) -> list[Divergence]:
    """`divergence` of several candidates; the reference's logits are made once for all of them."""
    for _, each in others:
        if len(states) != len(each):
            raise ValueError(
                f"hidden states of {len(states)} tokens and of {len(each)}: both models must be"
                " run on the same chunks"
            )
    found = [list[Divergence]() for _ in others]
    rows = min(each.rows for each in (reference, *(tiles for tiles, _ in others)))
    for start in range(0, len(states), rows):
        some = slice(start, start + rows)
        sums = [_Sums(len(states[some]), states.device) for _ in others]
        theirs = [tiles.logits(each[some]) for tiles, each in others]
        for (offset, a), *rest in zip(reference.logits(states[some]), *theirs, strict=True):
            for own, (_, b) in zip(sums, rest, strict=True):
                own.add(offset, a, b)
        for parts, own in zip(found, sums, strict=True):
            parts.append(own.finished())
    return [joined(each) for each in found]


class _Sums:
    """`definitions.compare`'s running sums of so many tokens."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._sums = torch.zeros(5, tokens, dtype=torch.float64, device=device)
        self._sums[[0, 3]] = LEAST
        self._best = torch.zeros(2, tokens, dtype=torch.int64, device=device)

    def add(self, offset: int, a: Tensor, b: Tensor) -> None:
        compare(self._sums, self._best, offset, a, b)

    def finished(self) -> Divergence:
        largest_p, total_p, apart, largest_q, total_q = self._sums
        nats = apart / total_p - (largest_p + total_p.log()) + (largest_q + total_q.log())
        return Divergence(nats.clamp(min=0).cpu(), (self._best[0] == self._best[1]).cpu())
