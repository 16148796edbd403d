"""How far a model's predictions are from another's: over whole distributions, token by token.

    KL(p ‖ q) = Σ_i p_i (log p_i − log q_i)        p of the 16-bit model, q of the candidate; nats

from last hidden states and heads, in tiles of the vocabulary. With logits a and b, and m any number
near the largest a so far,

    KL = [ Σ exp(a_i − m) (a_i − b_i) ] / [ Σ exp(a_i − m) ] − log Σ exp(a_i) + log Σ exp(b_i)

whose sums grow tile by tile. They run in float64: the terms are large and cancel.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpq_core.evaluation.head import ROWS, RunningSums, Tiles


@dataclass(frozen=True, eq=False)
class Divergence:
    """Token by token, [tokens]. nats: KL(p ‖ q), float64. agree: both have the same most likely
    piece."""

    nats: Tensor
    agree: Tensor

    def summary(self) -> dict[str, float]:
        """mean, median, quantiles and maximum in nats a token; `top1_agreement` a share of 1. A
        token whose predictions are not finite makes all of them NaN."""
        at = torch.tensor([0.5, 0.99, 0.999, 1.0], dtype=torch.float64)
        finite = bool(torch.isfinite(self.nats).all())
        median, high, higher, most = (
            torch.quantile(self.nats, at).tolist() if finite else [torch.nan] * 4
        )
        return {
            "mean": self.nats.mean().item() if finite else torch.nan,
            "median": median,
            "p99": high,
            "p99_9": higher,
            "max": most,
            "top1_agreement": self.agree.double().mean().item() if finite else torch.nan,
        }


def joined(parts: Iterable[Divergence]) -> Divergence:
    """The divergences of chunks, one after another."""
    found = list(parts)
    return Divergence(torch.cat([p.nats for p in found]), torch.cat([p.agree for p in found]))


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
    if len(states) != len(other_states):
        raise ValueError(
            f"hidden states of {len(states)} tokens and of {len(other_states)}: both models must be"
            " run on the same chunks"
        )
    parts = []
    for start in range(0, len(states), ROWS):
        some = slice(start, start + ROWS)
        tiles = zip(reference(states[some]), other(other_states[some]), strict=True)
        parts.append(_of_tiles(((first, p, q) for (first, p), (_, q) in tiles)))
    return joined(parts)


def _of_tiles(tiles: Iterable[tuple[int, Tensor, Tensor]]) -> Divergence:
    """Divergences, from tiles of logits [tokens, pieces] fp32, and the number of their first
    piece."""
    expected, found, at = RunningSums(), RunningSums(), None
    for first, p, q in tiles:
        a, b = p.double(), q.double()
        expected.add(first, a)
        found.add(first, b)
        largest = a.amax(-1).clamp(min=torch.finfo(a.dtype).min)  # of a tile of −∞
        if at is None:
            at, weights, apart = largest, torch.zeros_like(largest), torch.zeros_like(largest)
        moved = torch.maximum(at, largest)
        shrunk, at = (at - moved).exp(), moved
        shares = (a - at[:, None]).exp()
        weights = weights * shrunk + shares.sum(-1)
        # A piece that p excludes (−∞) counts nothing, whatever q says of it.
        apart = apart * shrunk + torch.where(shares > 0, shares * (a - b), 0.0).sum(-1)
    theirs, ours = expected.finished(), found.finished()
    nats = apart / weights - theirs.log_sums + ours.log_sums
    return Divergence(nats.clamp(min=0).cpu(), (theirs.best == ours.best).cpu())
