"""Attention of a pack, put where transformers' models call theirs.

A model hands keyword arguments that it does not know on to its attention, so the pack travels in
`forest`. Queries, keys and values come after everything an architecture does to them (norms, rotary
embeddings, by the positions that the model was called with). Where a pack has spans, each one's
product is torch's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dpq_core.evaluation.packs import Pack
from dpq_core.evaluation.spans import Span
from dpq_core.kernels import tree_attention

NAME = "dpq_forest"


@dataclass
class Carried:
    """Keys and values of one block that later packs of a chunk need, [1, heads, kept, size]."""

    key_values: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Forest:
    """What attention is told: the pack that runs, its spans if it goes by them, and what was
    carried to it."""

    pack: Pack
    spans: Sequence[Span] = ()
    carried: Carried = field(default_factory=Carried)


class UnsharedError(Exception):
    """An attention that is not told of the pack."""


def attend(
    module: nn.Module,
    query: Tensor,  # [1, heads, tokens, size]
    key: Tensor,  # [1, key heads, tokens, size]
    value: Tensor,  # [1, key heads, tokens, size]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    forest: Forest | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' functions of this kind: [1, tokens, heads, size], and no weights.

    Raises:
        UnsharedError: no pack came, or a mask did.
    """
    if forest is None or attention_mask is not None:
        raise UnsharedError("its attention is not called with what the model is called with")
    if forest.carried.key_values is not None:
        key = torch.cat([forest.carried.key_values[0], key], 2)
        value = torch.cat([forest.carried.key_values[1], value], 2)
    kept = forest.pack.kept
    forest.carried.key_values = (key[:, :, kept], value[:, :, kept]) if len(kept) else None
    if not forest.spans:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        seen = forest.pack.seen(sliding_window)
        return tree_attention.attend(query[0], key[0], value[0], seen, scale)[None], None
    # Kernels there take no mask beside keys for several heads.
    shared = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(shared, 1) for each in (key, value))
    y = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for span in forest.spans:
        mask = span.sight.mask(sliding_window, query.dtype)
        found = scaled_dot_product_attention(
            query[:, :, span.start : span.stop],
            key[:, :, span.keys],
            value[:, :, span.keys],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
        )
        y[:, span.start : span.stop] = found.transpose(1, 2)
    return y, None


def attend_by_packs(model: Any) -> None:
    """Have a model's attention go by packs. Without a mask function of this name transformers
    makes no masks."""
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
