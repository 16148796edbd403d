"""Greedy decoding of a transformers causal LM with a static KV cache: the work that is timed.

A step takes the last tokens [batch, 1], appends their keys and values to the cache in place, and
writes the next tokens where it read the last. Nothing in it depends on a value that the host would
have to see, so that on CUDA one step is captured as a graph, once, and replayed: what remains of a
step's time is the device's. transformers' `StaticCache` counts its tokens on the device, and may be
shared by decoders that take turns.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

_WARM_UP = 2  # steps before a capture: allocate, tune kernels


def static_cache(model: Any, batch: int, length: int) -> StaticCache:
    """Keys and values of `batch` sequences of `length` tokens, with all of their memory."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    cache.early_initialization(batch, *_heads(model.config), model.dtype, model.device)
    cache.reset()  # the kernel gives memory when it is written to
    return cache


def context_bytes(config: Any) -> int:
    """Keys and values of one token of one sequence, in 16 bits."""
    heads, size = _heads(config)
    return 2 * 2 * int(config.get_text_config().num_hidden_layers) * heads * size


def _heads(config: Any) -> tuple[int, int]:
    """How many heads keys have, and their size."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(heads), int(size)


class Decoder:
    """One model at one batch.

    Args:
        cache: long enough for prompt and new tokens.
        graph: replay steps as a CUDA graph, which is captured now and clears the cache.
    """

    def __init__(self, model: Any, cache: StaticCache, batch: int, graph: bool) -> None:
        self.cache = cache
        self._model = model
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self._graph = self._captured() if graph else None

    def start(self, prompts: Tensor) -> Tensor:
        """Read prompts [batch, length] into an empty cache (`clear`); the first new tokens
        [batch, 1]."""
        self._token.copy_(self._next(prompts))
        return self._token

    def step(self) -> Tensor:
        """The next tokens [batch, 1], in the same memory each time."""
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        return self._token

    def clear(self) -> None:
        """Empty the cache."""
        self.cache.reset()

    def _advance(self) -> None:
        self._token.copy_(self._next(self._token))

    def _next(self, tokens: Tensor) -> Tensor:
        """The next token of each sequence, from the last position alone, in one block of memory:
        given a slice of three dimensions, as by transformers' `logits_to_keep`, torch copies the
        head's weight for each sequence."""
        with torch.inference_mode():
            states = self._model.base_model(
                input_ids=tokens, past_key_values=self.cache, use_cache=True
            ).last_hidden_state
            logits = self._model.get_output_embeddings()(states[:, -1].contiguous())
            chosen: Tensor = logits.argmax(-1, keepdim=True)
        return chosen

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A step as a graph. Warmed up on a stream of its own, as PyTorch's notes on CUDA graphs
        ask for."""
        self.clear()
        device = self._model.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._advance()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        return graph


def generate(decoder: Decoder, prompts: Tensor, new_tokens: int) -> Tensor:
    """Greedy tokens [batch, new_tokens] that follow prompts [batch, length]."""
    decoder.clear()
    tokens = [decoder.start(prompts).clone()]
    tokens += [decoder.step().clone() for _ in range(new_tokens - 1)]
    return torch.cat(tokens, dim=1)
