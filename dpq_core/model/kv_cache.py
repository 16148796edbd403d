"""Where a model hands its keys and values to a cache, and what is put between.

An attention of transformers calls `past_key_values.update(key, value, …)` after all that it does to
both (norms, rotary embeddings), and goes on with what comes back: there an engine's cache is. A
hook gives it a `Between` in place of the cache, or of none. So keys and values are rounded, or
looked at, whoever computes the attention, with a cache and without, in generation and in scoring.

Two models keep something else, and are refused: a latent from which keys and values are made, and
blocks that read another block's.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dpq_core.errors import CheckpointError, first_line
from dpq_core.layer.kv_cache import KEY_SCALE, VALUE_SCALE, CacheMaxima, CacheScales, as_kept
from dpq_core.model.anatomy import parts_of
from dpq_core.model.blocks import BlockStream
from dpq_core.model.observation import fill, identity, small_of
from dpq_core.model.small import random_tensors, tokens

_ARGUMENT = "past_key_values"

# What comes of keys and values [batch, heads, tokens, size] in an attention.
Seen = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


class Between:
    """Stands where the model's cache does, or where there is none."""

    def __init__(self, seen: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], cache: Any) -> None:
        self._seen, self._cache = seen, cache

    def update(self, key: Tensor, value: Tensor, *about: Any, **named: Any) -> Any:
        key, value = self._seen(key, value)
        if self._cache is None:
            return key, value
        return self._cache.update(key, value, *about, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def attention_of(block: nn.Module) -> str | None:
    """The path in a block of its one attention that hands keys and values to a cache."""
    taking = [name for name, module in block.named_modules() if name and _takes_cache(module)]
    found = [each for each in taking if not any(other.startswith(f"{each}.") for other in taking)]
    return found[0] if len(found) == 1 else None


def _takes_cache(module: nn.Module) -> bool:
    return _ARGUMENT in inspect.signature(module.forward).parameters


def round_cache(attention: nn.Module, key_scale: Tensor, value_scale: Tensor) -> None:
    """Have an attention's keys and values rounded by these scales, which become buffers of it."""
    attention.register_buffer(KEY_SCALE, key_scale)
    attention.register_buffer(VALUE_SCALE, value_scale)
    _put_between(attention, _rounded)


def _rounded(attention: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    scales = attention.get_buffer(KEY_SCALE), attention.get_buffer(VALUE_SCALE)
    return as_kept(key, scales[0]), as_kept(value, scales[1])


@contextmanager
def maxima_of_cache(attention: nn.Module) -> Iterator[list[CacheMaxima]]:
    """The largest keys and values that an attention hands on while this lasts, a batch each."""
    found: list[CacheMaxima] = []

    def look(_: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found.append(CacheMaxima.of(key, value))
        return key, value

    handle = _put_between(attention, look)
    try:
        yield found
    finally:
        handle.remove()


def _put_between(attention: nn.Module, seen: Seen) -> RemovableHandle:
    def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        between = Between(partial(seen, module), named.get(_ARGUMENT))
        return arguments, {**named, _ARGUMENT: between}

    return attention.register_forward_pre_hook(hook, with_kwargs=True)


def cached_attention(stream: BlockStream, index: int) -> tuple[str, str] | None:
    """The attention of a block whose keys and values an engine keeps, and the shared input that it
    makes (of the last linear of its own), by name. None: a block of a vision tower, or the head."""
    if index == stream.block_count:
        return None
    found = attention_of(stream.empty_block(index))
    name = f"{stream.block_name(index)}.{found}"
    own = [first for first, *_ in stream.groups(index) if first.startswith(f"{name}.")]
    return (name, own[-1]) if found and own else None


def cached_attentions(stream: BlockStream) -> dict[str, str]:
    """Of all blocks."""
    found = (cached_attention(stream, index) for index in range(stream.block_count))
    return dict(each for each in found if each)


def round_cache_of(stream: BlockStream, scales: Mapping[str, CacheScales]) -> None:
    """Have keys and values rounded in blocks that are made from now on. scales: by attention."""
    for index in range(stream.block_count):
        if (found := cached_attention(stream, index)) and found[0] in scales:
            path, own = stream.block_name(index), scales[found[0]]
            attention = stream.empty_block(index).get_submodule(found[0].removeprefix(f"{path}."))
            round_cache(attention, own.keys, own.values)


def check_cache(model: Any) -> None:
    """Whether all of a model's blocks hand their keys and values to a cache of their own, as an
    engine keeps them: a small instance is run. model: of `empty.empty_of`.

    Raises:
        CheckpointError: what stands in the way.
    """
    key = identity(model)
    if key not in _FOUND:
        _FOUND[key] = _in_the_way(model)
    if why := _FOUND[key]:
        name = f"{type(model).__name__} (model_type {model.config.model_type!r})"
        raise CheckpointError(f"scheme.kv_cache: {name}: {why}: set scheme.kv_cache: none")


_FOUND: dict[str, str | None] = {}


def _in_the_way(model: Any) -> str | None:
    text, parts = model.config.get_text_config(), parts_of(model)
    if getattr(text, "kv_lora_rank", None):
        return "engines keep the latent that keys and values are made of (kv_lora_rank)"
    if shared := getattr(text, "num_kv_shared_layers", None):
        return f"{shared} of its blocks read the keys and values of others (num_kv_shared_layers)"
    small = small_of(model, parts)
    fill(small, random_tensors(small))
    for number, block in enumerate(small.get_submodule(parts.blocks)):
        if (path := attention_of(block)) is None:
            return f"block {number} ({type(block).__name__}) has no one attention with a cache"
        try:
            with torch.no_grad(), maxima_of_cache(block.get_submodule(path)) as found:
                small(input_ids=tokens(), use_cache=False)
        except Exception as error:  # of any architecture's forward
            return f"{path} of block {number} takes no cache of ours ({first_line(error)})"
        if len(found) != 1:
            return f"{path} of block {number} hands keys and values to its cache {len(found)} times"
    return None
