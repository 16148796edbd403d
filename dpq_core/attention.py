"""Attention of a decoding step without copies of the keys and values.

Where several heads of queries share one of keys, transformers repeats keys and values for each of
them before a masked product: a step then writes and reads the whole cache that many times. With one
query a head, the heads of a group can stand in the place of queries instead,

    query [batch, heads, 1, size] → [batch, key heads, heads / key heads, size]

which is the same product, and reads each key once. Prompts are left to transformers.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_grouped"


def attend_in_groups(model: Any) -> Any:
    """The same model with this attention where it uses torch's own; others stay."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    return model


def _attend(
    module: nn.Module,
    query: Tensor,  # [batch, heads, queries, size]
    key: Tensor,  # [batch, key heads, length, size]
    value: Tensor,  # [batch, key heads, length, size]
    attention_mask: Tensor | None,  # [batch, 1, queries, length] bool
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' functions of this kind: [batch, queries, heads, size], and no weights."""
    heads, shared = query.shape[1], key.shape[1]
    if query.shape[2] > 1 or heads == shared or others.get("position_bias") is not None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return found
    grouped = query.reshape(len(query), shared, heads // shared, -1)
    mask = None if attention_mask is None else attention_mask.expand(-1, -1, heads // shared, -1)
    y = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return y.reshape(len(query), 1, heads, -1), None
