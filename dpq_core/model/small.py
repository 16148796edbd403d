"""A small random instance of a model: the same class, the same configuration but for its sizes.

What decides how a model computes stays: kinds of layers and their order, the size of a head,
biases, scalings, soft caps, the routing of experts. What only makes it large goes: heads, widths,
vocabulary, experts, and the blocks after the first of the last kind. A sliding window becomes short
enough to matter on a few tokens.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from dpq_core.model.anatomy import path_of

TOKENS = 24  # of a sequence that the instance is run on
_VOCABULARY, _INNER, _EXPERTS, _WINDOW = 96, 48, 4, 8
_STD = 0.3  # of biases and the like; matrices: 1 / √in

_INNER_WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
)
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_WINDOWS = ("sliding_window", "attention_chunk_size")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")


def small_config(config: Any, blocks: int) -> Any:
    """A copy of a configuration, shrunken, of so many blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:blocks])
        elif name.endswith("_token_id"):  # must be below the size of the vocabulary
            setattr(text, name, None)
    text.num_hidden_layers = blocks
    text.vocab_size = _VOCABULARY
    _shrink_heads(text)
    for name in _INNER_WIDTHS:
        _lower(text, name, _INNER)
    for name in _WINDOWS:
        _lower(text, name, _WINDOW)
    if any(_is_number(text, name) for name in _EXPERT_COUNTS):
        for name in _EXPERT_COUNTS:
            _lower(text, name, _EXPERTS)
        for name, most in (("num_experts_per_tok", 2), ("n_group", 2), ("topk_group", 1)):
            _lower(text, name, most)
    return config


def _shrink_heads(text: Any) -> None:
    """At most two key heads, and two query heads for each; a head stays as wide as it is."""
    heads, hidden = text.num_attention_heads, text.hidden_size
    names = [name for name in _KEY_HEADS if _is_number(text, name)]
    keys = getattr(text, names[0]) if names else heads
    fewer = min(keys, 2)
    for name in names:
        setattr(text, name, fewer)
    text.num_attention_heads = fewer * min(heads // keys, 2)
    text.hidden_size = hidden // heads * text.num_attention_heads
    if getattr(text, "word_embed_proj_dim", None) == hidden:  # OPT: no projection
        text.word_embed_proj_dim = text.hidden_size


def _lower(text: Any, name: str, most: int) -> None:
    if _is_number(text, name):
        setattr(text, name, min(getattr(text, name), most))


def _is_number(text: Any, name: str) -> bool:
    return type(getattr(text, name, None)) is int


def random_tensors(model: Any) -> dict[str, Tensor]:
    """Random values for all that a checkpoint of a model holds, by name: parameters but a tied
    head, and stored buffers; the same on every call. Matrices [out, in]: normal, of deviation
    1 / √in; the rest: 1 or 0, and some noise.
    """
    generator, found = torch.Generator().manual_seed(0), {}
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or (tensor.is_meta and name not in parameters):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            noise = noise / max(tensor.shape[-1], 1) ** 0.5
        else:
            noise = _STD * noise + float(name.endswith("weight"))
        found[name] = noise.to(tensor.dtype)
    if model.config.tie_word_embeddings:
        del found[f"{path_of(model, model.get_output_embeddings())}.weight"]
    return found


def tokens() -> Tensor:
    """[2, TOKENS] int64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(_VOCABULARY, (2, TOKENS), generator=generator)
