"""All that a suite asks of a model, tokenised once: the same tokens for baseline and candidate.

Contexts, continuations, begin-of-text tokens, empty contexts and rolling windows are those of
lm-evaluation-harness: its own `HFLM` encodes them here, without a model, and what it would run is
taken down. What we decide otherwise: no end-of-text token closes a context (ByT5's tokenizer puts
one behind every text), and a token without a row in the embedding is refused.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpq_core.digests import digest
from dpq_core.evaluation.forest import Asked
from dpq_core.evaluation.open_texts import check_beginning, opened_by
from dpq_core.evaluation.suites.definitions import Suite, SuiteError, quiet
from dpq_core.model.context import check_ids, context_of

_ROLLING = "loglikelihood_rolling"
_CONTEXTS = 256  # the choices of a question come one after another, and share its context


@dataclass(frozen=True)
class SuiteRequests:
    """What a suite asks. count: of requests, in the order of its tasks and of their documents.
    truncated: those cut to the model's window. harness_tokens: of the sequences that the harness
    would run, one-token choices of a context together."""

    asked: list[Asked]
    count: int
    truncated: int
    harness_tokens: int


class Encoder:
    """Turns a suite's requests into tokens.

    Args:
        config: of the model; its text part says how long a sequence may be.

    Raises:
        SuiteError: the tokenizer has no token to begin an empty context with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
        quiet()
        check_beginning(tokenizer)
        self._config, self._tokenizer = config.get_text_config(), tokenizer
        self._harness = _encoding_harness(copy.deepcopy(tokenizer), self._config)

    @property
    def identity(self) -> dict[str, Any]:
        """What the tokens depend on besides the texts: part of a key."""
        return {
            "tokenizer": _fingerprint(self._tokenizer),
            "window": self.window,
            "rows": getattr(self._config, "vocab_size", None),
        }

    @property
    def window(self) -> int:
        """Tokens that the model reads at most."""
        longest: int = self._harness.max_length
        return longest

    def requests_of(self, suite: Suite, limit: int | None = None) -> SuiteRequests:
        """`limit`: the first documents of each of the suite's tasks. Raises as `encoded`."""
        for task in suite.tasks.values():
            task.build_all_requests(limit=limit, rank=0, world_size=1)
        return self.encoded(suite)

    def encoded(self, suite: Suite) -> SuiteRequests:
        """The requests, encoded, of a suite whose requests the harness has built.

        Raises:
            SuiteError: a continuation longer than the model's window.
            ContextError: a token that the model does not know.
        """
        harness, longest = self._harness, self.window
        asked, truncated, count = list[Asked](), 0, 0
        for task in suite.tasks.values():
            for instance in task.instances:
                rolling = instance.request_type == _ROLLING
                for before, after in harness.taken(instance):
                    check_ids(self._config, self._tokenizer, [*before, *after], suite.name)
                    if len(after) > longest:
                        raise SuiteError(
                            f"suite {suite.name!r}: a continuation has {len(after)} tokens, and the"
                            f" model's window {longest}: leave such documents out"
                        )
                    ids = (*before, *after)[-(longest + 1) :]
                    truncated += not rolling and len(before) + len(after) > longest + 1
                    asked.append(Asked(ids, len(after), count))
                count += 1
        tokens = sum(map(len, {each.ids[:-1] for each in asked}))
        return SuiteRequests(asked, count, truncated, tokens)


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer: its own description where it has one, else its pieces."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    # What it puts around a text is seen on one; `add_bos_token` may be set after it was made.
    return digest([type(tokenizer).__name__, pieces, special, list(tokenizer("a").input_ids)])


def asked_of_windows(windows: Tensor) -> list[Asked]:
    """Perplexity's windows, [windows, length] int64: all tokens but the first are predicted; the
    windows are the requests."""
    rows = windows.tolist()
    return [Asked(tuple(row), len(row) - 1, number) for number, row in enumerate(rows)]


def _encoding_harness(tokenizer: PreTrainedTokenizerBase, config: Any) -> Any:
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM  # seconds

    opened = opened_by(tokenizer)

    class Encoding(HFLM):  # type: ignore[misc, unused-ignore]
        """HFLM that encodes and runs nothing. Its `__init__` wants a model, and is left out."""

        backend = "causal"
        add_bos_token = custom_prefix_token_id = enable_thinking = None
        batch_size = world_size = 1
        rank = 0
        model = SimpleNamespace(config=config)

        def __init__(self) -> None:
            LM.__init__(self)
            self.tokenizer = tokenizer
            self._max_length = context_of(config)
            self._taken: list[tuple[list[int], list[int]]] = []
            self._once = lru_cache(_CONTEXTS)(super().tok_encode)

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            return opened(list(self._once(string, *args, **kwargs)))

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            self._taken += [(before, after) for _, before, after in requests]
            return [(0.0, False)] * len(requests)

        def taken(self, instance: Any) -> Sequence[tuple[list[int], list[int]]]:
            """Tokens of contexts and continuations that HFLM would run for a request."""
            self._taken = []
            getattr(self, instance.request_type)([instance], disable_tqdm=True)
            return self._taken

    return Encoding()
