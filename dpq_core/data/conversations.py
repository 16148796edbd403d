"""Conversations as a model reads them: messages written by its own chat template.

A row's column holds a list of messages, `{"role": "user", "content": "…"}`. The template writes the
begin-of-text token itself where the model has one, and the tokenizer would put another before it:
the template's is taken off here.
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpq_core.errors import DataError, first_line


def written(
    rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, where: str
) -> list[str]:
    """Each row's messages as a text, to be tokenised with the tokenizer's special tokens.

    Args:
        where: names the column in errors.

    Raises:
        DataError: no chat template, no rows, rows that are no messages, or messages that the
            template does not take (a role that it does not know, say).
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: messages, and the model's tokenizer has no chat template to write them with:"
            " name a text_column, or take a model that is made for conversations"
        )
    if not rows:
        raise DataError(f"{where}: no rows")
    return [_written(row, tokenizer, f"{where}, row {n}") for n, row in enumerate(rows)]


def _written(row: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if not isinstance(row, list) or not row or not all(map(_is_message, row)):
        raise DataError(
            f"{where}: not a list of messages, each with the texts 'role' and 'content':"
            " if it is a text, name it as text_column"
        )
    messages = [{name: message[name] for name in ("role", "content")} for message in row]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError) as error:
        raise DataError(f"{where}: the chat template refuses it: {first_line(error)}") from error
    opens = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(tokenizer.bos_token)) if opens else text


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(name), str) for name in ("role", "content")
    )
