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

from dpq_core.evaluation.head import Predicted, RunningSums, Tiles


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
    parts = list[list[Divergence]]()
    for start in range(0, len(states), reference.rows):
        some = slice(start, start + reference.rows)
        theirs = [tiles.logits(each[some]) for tiles, each in others]
        parts.append(
            _of_tiles(zip(reference.logits(states[some]), *theirs, strict=True), len(others))
        )
    return [joined(each) for each in zip(*parts, strict=True)]


def _of_tiles(tiles: Iterable[tuple[tuple[int, Tensor], ...]], others: int) -> list[Divergence]:
    """Divergences, from tiles of logits [tokens, pieces] fp32 and the number of their first piece:
    of the reference, and of so many others."""
    expected, at = RunningSums(), None
    found = [RunningSums() for _ in range(others)]
    for (first, p), *rest in tiles:
        a = p.double()
        expected.add(first, a)
        largest = a.amax(-1).clamp(min=torch.finfo(a.dtype).min)  # of a tile of −∞
        if at is None:
            at, weights = largest, torch.zeros_like(largest)
            apart = [torch.zeros_like(largest) for _ in range(others)]
        moved = torch.maximum(at, largest)
        shrunk, at = (at - moved).exp(), moved
        shares = (a - at[:, None]).exp()
        weights = weights * shrunk + shares.sum(-1)
        for number, (_, q) in enumerate(rest):
            b = q.double()
            found[number].add(first, b)
            # A piece that p excludes (−∞) counts nothing, whatever q says of it.
            terms = torch.where(shares > 0, shares * (a - b), 0.0)
            apart[number] = apart[number] * shrunk + terms.sum(-1)
    theirs = expected.finished()
    return [
        _divergence(each / weights, theirs, ours.finished())
        for each, ours in zip(apart, found, strict=True)
    ]


def _divergence(apart: Tensor, theirs: Predicted, ours: Predicted) -> Divergence:
    nats = apart - theirs.log_sums + ours.log_sums
    return Divergence(nats.clamp(min=0).cpu(), (theirs.best == ours.best).cpu())
