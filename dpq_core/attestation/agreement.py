"""How far an engine is from our own arithmetic, on the same tokens.

Of each token x_t of the text the engine says log q(x_t), and its k most likely pieces S_t with
their log q. Ours are log p, over the whole vocabulary, of the model that defines what is right.

    difference   |log p(x_t) − log q(x_t)|, nats: mean and maximum over the tokens
    divergence   KL of both with all pieces outside S_t taken together as one:
                 Σ_{i ∈ S_t} p_i (log p_i − log q_i) + r_p (log r_p − log r_q)
                 with r = 1 − Σ_{i ∈ S_t}
    agreement    share of the tokens whose most likely piece is the same; of pieces that are equally
                 likely, as in 16 bits many are, any

Taking pieces together never raises a divergence (the log-sum inequality), so this is a lower bound
of KL(p ‖ q), and is that where S_t is the vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dpq_core.evaluation.forest import chunks_of
from dpq_core.evaluation.head import head_tiles, predicted
from dpq_core.evaluation.requests import asked_of_windows
from dpq_core.evaluation.scorer import last_states
from dpq_core.evaluation.subject import Subject
from dpq_core.recipe.attest import AttestLimits

Said = Mapping[int, float]  # of one token: log q of the piece that follows and of the most likely

_REST = 1e-9  # least probability of all pieces outside of S_t: what rounding leaves of none
_UNITS = {"mean_difference": " nats", "max_difference": " nats", "divergence": " nats a token"}


@dataclass(frozen=True)
class Agreement:
    """Figures over `predictions` tokens. bias: mean of log p − log q, which has a sign; top: k.
    `loss` and `engine_loss`: −mean log p and −mean log q of the text; all in nats."""

    predictions: int
    top: int
    mean_difference: float
    max_difference: float
    bias: float
    divergence: float
    top1_agreement: float
    loss: float
    engine_loss: float

    def as_dict(self) -> dict[str, float]:
        """Numbers that are not finite become None: JSON has none."""
        return {n: v if math.isfinite(v) else None for n, v in asdict(self).items()}  # type: ignore[misc]


@torch.no_grad()
def agreement(
    subject: Subject,
    windows: Tensor,  # [windows, length] int64
    said: Sequence[Sequence[Said]],  # a row a window, [length − 1] each: of tokens 1 …
    top: int,
) -> Agreement:
    """Compare what an engine said of windows with a model of ours.

    Raises:
        ValueError: not an entry for each predicted token, or one that lacks the token itself.
    """
    pieces, theirs = _table(windows, said, top)
    ours, best = _ours(subject, windows, pieces)
    apart = ours[:, 0] - theirs[:, 0]
    p, q = ours[:, 1:].exp(), theirs[:, 1:].exp()
    rest_p, rest_q = ((1 - each.sum(1)).clamp(min=_REST) for each in (p, q))
    terms = torch.where(p > 0, p * (ours[:, 1:] - theirs[:, 1:]), 0.0)
    nats = terms.sum(1) + rest_p * (rest_p / rest_q).log()
    return Agreement(
        predictions=len(apart),
        top=top,
        mean_difference=float(apart.abs().mean()),
        max_difference=float(apart.abs().max()),
        bias=float(apart.mean()),
        divergence=float(nats.clamp(min=0).mean()),
        top1_agreement=float(_agree(ours, theirs, best).double().mean()),
        loss=-float(ours[:, 0].mean()),
        engine_loss=-float(theirs[:, 0].mean()),
    )


def exceeded(found: Agreement, limits: AttestLimits) -> list[str]:
    """What is beyond its limit, or no number: empty where the engine agrees."""
    reasons = []
    for name, limit in limits.model_dump().items():
        value = getattr(found, name)
        within = value >= limit if name == "top1_agreement" else value <= limit
        if not within:  # NaN is not
            unit = _UNITS.get(name, "")
            side = "at least" if name == "top1_agreement" else "at most"
            reasons.append(f"{name} is {value:.4g}{unit}, {side} {limit:g} is allowed")
    if found.top1_agreement < 0.5:
        reasons.append("so far apart are two models: does the engine serve another one?")
    return reasons


def _agree(ours: Tensor, theirs: Tensor, best: Tensor) -> Tensor:
    """Whether a piece is the most likely one, or equal to it, for both; all [tokens, pieces].
    best: the first of ours, which may be none of the pieces."""
    first = (ours == ours.amax(1, keepdim=True)) & (theirs == theirs.amax(1, keepdim=True))
    return first.any(1) & best.any(1)


def _table(windows: Tensor, said: Sequence[Sequence[Said]], top: int) -> tuple[Tensor, Tensor]:
    """Pieces [tokens, 1 + top] int64, the token that follows and the most likely ones, the first
    first; and their log q, float64."""
    following = windows[:, 1:].flatten().tolist()
    entries = [entry for window in said for entry in window]
    if len(entries) != len(following):
        raise ValueError(f"an engine said {len(entries)} of {len(following)} tokens")
    pieces, logs = list[list[int]](), list[list[float]]()
    for token, entry in zip(following, entries, strict=True):
        if token not in entry or len(entry) < top:
            raise ValueError(f"an engine said nothing of token {token}, or less than {top} pieces")
        most = sorted(entry, key=lambda piece: -entry[piece] if entry[piece] == entry[piece] else 0)
        pieces.append([token, *most[:top]])
        logs.append([entry[piece] for piece in pieces[-1]])
    return torch.tensor(pieces), torch.tensor(logs, dtype=torch.float64)


def _ours(subject: Subject, windows: Tensor, pieces: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the pieces, float64, and whether each is the most likely of the vocabulary; both
    [tokens, pieces], in the order of the windows' tokens."""
    chunks = list(chunks_of(asked_of_windows(windows)))
    order = torch.cat([chunk.requests for chunk in chunks]).argsort(stable=True)
    wanted = pieces[order.argsort()].split([len(chunk.requests) for chunk in chunks])
    logs, likely = list[Tensor](), list[Tensor]()
    states = last_states(subject, chunks)
    with head_tiles(subject.stream) as tiles:
        for chunk, last, asked in zip(chunks, states, wanted, strict=True):
            rows = last.rows(chunk).repeat_interleave(asked.shape[1])
            found, best = predicted(tiles, last.hidden, rows, asked.flatten())
            logs.append(found.reshape(asked.shape))
            likely.append(best.reshape(asked.shape))
    return torch.cat(logs)[order], torch.cat(likely)[order]
