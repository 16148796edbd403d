"""Windows against what a model can read: positions, and ids that have a row in its embedding.

A model reads `max_position_embeddings` tokens; where positions are scaled at run time (RoPE
`linear`, `dynamic`, `yarn`) `factor` times as many as it was trained on, which the configuration
names beside it or leaves in `max_position_embeddings`: the larger counts. `llama3` and `longrope`
have the scaled number there already. A sliding window bounds what a token sees, not how many there
are. Beyond the context a model answers as before, and worse: nothing fails.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dpq_core.errors import InputError, listed

_SCALED_AT_RUN_TIME = ("linear", "dynamic", "yarn")


class ContextError(InputError):
    """Windows that a model cannot read."""


def context_of(config: Any) -> int | None:
    """Tokens that a text model's configuration has positions for; None: no bound."""
    length: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if length is None or rope.get("rope_type") not in _SCALED_AT_RUN_TIME:
        return length
    trained = rope.get("original_max_position_embeddings") or length
    return max(length, int(trained * (rope.get("factor") or 1)))


def check_lengths(config: Any, lengths: Mapping[str, int]) -> None:
    """Windows of each setting's tokens fit into the context.

    Args:
        config: of the text model.

    Raises:
        ContextError: naming the setting, its length, and the context.
    """
    context = context_of(config)
    for setting, length in lengths.items():
        if context is not None and length > context:
            raise ContextError(
                f"{setting} is {length}, and the model's context is {context} tokens: lower it"
            )


def check_tokenizer(config: Any, tokenizer: Any) -> list[str]:
    """Lines about added tokens beyond the embedding, which no text may hold.

    Raises:
        ContextError: ordinary tokens lie beyond it: the tokenizer is another model's.
    """
    rows = getattr(config, "vocab_size", None)
    if rows is None:
        return []
    added = tokenizer.get_added_vocab()
    beyond = {token: id_ for token, id_ in tokenizer.get_vocab().items() if id_ >= rows}
    ordinary = sorted(beyond.keys() - added.keys(), key=beyond.__getitem__)
    if ordinary:
        raise ContextError(
            f"the tokenizer has ids up to {max(beyond.values())}, {ordinary[0]!r} for one, and the"
            f" model's embedding {rows} rows: the tokenizer is another model's"
        )
    if not beyond:
        return []
    named = sorted(beyond, key=beyond.__getitem__)
    shown = listed([f"{token!r} ({beyond[token]})" for token in named])
    return [f"tokens without a row in the model's embedding of {rows}: {shown}"]


def check_ids(config: Any, tokenizer: Any, ids: Tensor | list[int], where: str) -> None:
    """Each token of a text, [any shape] int64, has a row in the embedding.

    Raises:
        ContextError: naming the token, its id and the rows.
    """
    rows = getattr(config, "vocab_size", None)
    largest = int(ids.max()) if isinstance(ids, Tensor) else max(ids, default=0)
    if rows is not None and largest >= rows:
        token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
        raise ContextError(
            f"{where}: the texts hold token {largest}{token}, and the model's embedding has {rows}"
            " rows: leave such texts out, or give the model that belongs to this tokenizer"
        )
