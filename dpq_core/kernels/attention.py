"""Attention, where transformers' call of torch's own costs too much on this device.

A decoding step without copies of the keys and values. Where several heads of queries share one of
keys, transformers repeats keys and values for each of them before a masked product: a step then
writes and reads the whole cache that many times. With one query a head, the heads of a group can
stand in the place of queries instead,

    query [batch, heads, 1, size] → [batch, key heads, heads / key heads, size]

which is the same product, and reads each key once. Prompts are left to transformers.

On a processor without BF16 units: the same operands in FP32 (`dpq_core.kernels.products`), rounded
to BF16 once. Torch's BF16 attention rounds its weights too, before they are multiplied by the
values.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpq_core.kernels.sixteen_bit import widened

NAME, IN_FP32 = "sdpa_grouped", "sdpa_fp32"


def attend_in_groups(model: Any) -> Any:
    """The same model with this attention where it uses torch's own; others stay."""
    return _replaced(model, ("sdpa", IN_FP32), NAME, _attend)


def attend_in_fp32(model: Any) -> Any:
    """The same model, whose attention on a CPU multiplies BF16 as FP32 if it is torch's own."""
    return _replaced(model, ("sdpa",), IN_FP32, _attend_in_fp32)


def _replaced(model: Any, found: Sequence[str], name: str, attend: Any) -> Any:
    if getattr(model.config, "_attn_implementation", None) in found:
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, sdpa_mask)
        model.set_attn_implementation(name)
    return model


def _attend_in_fp32(
    module: nn.Module,
    query: Tensor,  # as `_attend`
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, None]:
    operands = query, key, value
    if widened(query):
        operands = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    y: Tensor = sdpa_attention_forward(module, *operands, attention_mask, **others)[0]
    return y.to(query.dtype), None


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
        masked = query, key, value, attention_mask
        return _attend_in_fp32(module, *masked, scaling=scaling, **others)
    grouped = query.reshape(len(query), shared, heads // shared, -1)
    mask = None if attention_mask is None else attention_mask.expand(-1, -1, heads // shared, -1)
    operands = grouped, key, value
    if widened(query):
        operands = grouped.float(), key.float(), value.float()
    y = scaled_dot_product_attention(*operands, attn_mask=mask, scale=scaling)
    return y.reshape(len(query), 1, heads, -1).to(query.dtype), None
