"""Texts as a suite's contexts are: they go on, so no tokenizer may close them."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from dpq_core.evaluation.suites.definitions import SuiteError


def check_beginning(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        SuiteError: the tokenizer has no token to begin an empty context with.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise SuiteError(
            "the tokenizer has neither a begin-of-text nor an end-of-text token:"
            " lm-evaluation-harness needs one for empty contexts"
        )


def opened_by(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], list[int]]:
    """Takes the tokens off that the tokenizer puts behind a text, where ids end in them."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    closed = tokenizer.encode("a")
    closing = closed[len(closed) - closed[::-1].index(plain[-1]) :]

    def opened(ids: list[int]) -> list[int]:
        return ids[: -len(closing)] if closing and ids[-len(closing) :] == closing else ids

    return opened
