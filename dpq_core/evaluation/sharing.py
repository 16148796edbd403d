"""The proof, before any work, that an architecture's attention can go by shared prefixes.

A small random instance (`dpq_core.model.small`) is run in FP32 on a tree of sequences, once as the
tree and once each sequence by itself. The hidden states must agree. What has no attention of this
kind (recurrent blocks), does not tell it of its windows, or adds to its products, shows here.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpq_core.evaluation.attention import NAME, UnsharedError, attend_by_packs
from dpq_core.evaluation.forest import Asked, Chunk, chunks_of
from dpq_core.evaluation.grain import CPU
from dpq_core.evaluation.walk import Walk, packs_walk, rows_walk
from dpq_core.model.anatomy import parts_of
from dpq_core.model.blocks import BlockStream
from dpq_core.model.observation import identity, small_of
from dpq_core.model.proof import InMemory
from dpq_core.model.small import random_tensors, tokens

_CLOSE = 1e-4  # of the largest hidden state: rounding of FP32 is 1e-6 of it
_BY_LENGTH = {"dynamic", "longrope"}  # rotary embeddings that depend on the longest of a pass


def why_not_shared(model: Any) -> str | None:
    """What stands in the way of sharing, in words; None: nothing. About a second, once for a class
    and configuration."""
    key = identity(model)
    if key not in _FOUND:
        _FOUND[key] = _found(model)
    return _FOUND[key]


_FOUND: dict[str, str | None] = {}


def _found(model: Any) -> str | None:
    for kind in _rotary_kinds(model.config.get_text_config()) & _BY_LENGTH:
        return f"its rotary embeddings ({kind}) depend on the longest sequence of a pass"
    small = small_of(model, parts_of(model)).float()
    tensors = {name: x.float() for name, x in random_tensors(small).items()}
    stream = BlockStream(small, InMemory(tensors))
    chunk = _tree()
    try:
        expected = _run(stream, rows_walk(stream, chunk))
        attend_by_packs(small)
        if small.config._attn_implementation != NAME:
            return "its attention is not called through transformers' interface"
        found = _run(stream, packs_walk(stream, chunk, replace(CPU, pack=16)))
    except UnsharedError as error:
        return str(error)
    except Exception as error:  # of any architecture's forward
        return next(iter(str(error).splitlines()), type(error).__name__)
    apart = float((found - expected).abs().max() / expected.abs().max())
    if apart < _CLOSE:
        return None
    return f"its hidden states differ by {apart:.1g} of the largest where prefixes are shared"


def _rotary_kinds(text: Any) -> set[str]:
    """The kinds of rotary embeddings in a text model's configuration; some have settings by kind of
    layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    settings = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    return {str(each.get("rope_type")) for each in settings}


def _tree() -> Chunk:
    """Three sequences of one root, the third of which leaves the second late, and another tree."""
    first, second = tokens().tolist()
    asked = [
        Asked((*first[:20], *second[:12]), 3, 0),
        Asked((*first[:20], *second[4:]), 4, 1),
        Asked((*first[:20], *second[4:16], 5, 6, 7), 4, 2),
        Asked(tuple(second), 5, 3),
    ]
    (chunk,) = chunks_of(asked)
    return chunk


@torch.no_grad()
def _run(stream: BlockStream, walk: Walk) -> Tensor:
    with stream.embedding(remembered=bool(walk.packs)) as begun:
        walk.begin(begun)
    for index in range(stream.block_count):
        with stream.block(index):
            walk.advance()
    return walk.states()
