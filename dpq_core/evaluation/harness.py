"""A model in memory, scored on suites of lm-evaluation-harness.

Every document's score stays with the result, so that two models can be compared document by
document. What the harness decides, and we decide otherwise:

- Log-likelihoods are computed in float32 (its `softmax_dtype`). Left to itself it takes the model's
  type, and in bfloat16 the choices of a question tie or swap by rounding alone.
- A log-likelihood that is not finite makes its document's score NaN, and the accuracy with it.
  The harness takes the first choice, and a broken model scores what the first choice scores.
- A tokenizer that closes every text with an end-of-text token (ByT5) is kept from closing contexts
  with it.
- Requests that are longer than the model's window are cut from the left, as the harness does; how
  many were is part of the result.
- A token without a row in the model's embedding is refused before anything runs, and a 16-bit model
  that overflows is named with its block (`dpq_core.model`).
- Nothing is cached: neither requests nor answers, nor data sets that come from files. No batch size
  is searched by trying 64 sequences of the model's whole window: see `device.halving_batches`.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpq_core.evaluation.open_texts import check_beginning, opened_by
from dpq_core.evaluation.results import in_order, scores_of
from dpq_core.evaluation.scores import Scores
from dpq_core.evaluation.suites.definitions import Suite, quiet
from dpq_core.model.context import check_ids, context_of
from dpq_core.model.empty import building
from dpq_core.model.finite import check_overflow

Progress = Callable[[int, int], None]


def evaluate_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    on_progress: Progress | None = None,
) -> Scores:
    """Score a suite on the model's device. The model is put into `eval`.

    `batch_size` counts requests (a question's choices), which are sorted by length; `limit` the
    first documents of each of the suite's tasks. `on_progress` gets the sequences run through the
    model so far, and those in all.

    Raises:
        SuiteError: the tokenizer has no token to begin an empty context with.
        ContextError: a token that the model does not know. NotFiniteError: it overflows.
    """
    quiet()
    with building:  # the harness ties the model's embeddings anew
        harness = _harness(model, tokenizer, batch_size, on_progress)
    return _score(harness, suite, limit)


def _harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    on_progress: Progress | None = None,
) -> Any:
    from lm_eval.models.huggingface import HFLM  # seconds

    check_beginning(tokenizer)
    opened = opened_by(tokenizer)

    class Harness(HFLM):  # type: ignore[misc, unused-ignore]
        """HFLM whose texts stay open, and which counts what it does."""

        asked = done = truncated = 0  # sequences; requests

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            return opened(super().tok_encode(string, *args, **kwargs))

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            lengths = [len(self.tok_encode(request.args[0])) for request in requests]
            self.asked += sum(-(-length // self.max_length) for length in lengths)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            known = model.config.get_text_config()
            for _, before, after in requests:
                check_ids(known, tokenizer, [*before, *after], "a suite")
            if override_bs is None:  # not one batch of rolling windows
                # One-token continuations of the same context share a sequence.
                self.asked += len({(*before, *after[:-1]) for _, before, after in requests})
                window = self.max_length + 1
                self.truncated += sum(len(before) + len(a) > window for _, before, a in requests)
            return super()._loglikelihood_tokens(requests, True, override_bs)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self.done += len(inps)
            if on_progress is not None:
                on_progress(self.done, self.asked)
            return logits

    return Harness(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # which is given a padding token
        batch_size=batch_size,
        max_length=context_of(model.config.get_text_config()),
        softmax_dtype="float32",
    )


def _score(harness: Any, suite: Suite, limit: int | None) -> Scores:
    # Not simple_evaluate: it seeds the process's generators and describes the machine for seconds.
    from lm_eval.evaluator import evaluate

    samples = evaluate(harness, {"tasks": suite.tasks}, limit=limit, bootstrap_iters=0)["samples"]
    ordered = in_order(suite, samples)
    scores = scores_of(suite, ordered, harness.truncated)
    for (_, sample), value in zip(ordered, scores.values, strict=True):
        if math.isnan(value):
            _explain(harness, sample)
            break
    return scores


def _explain(harness: Any, sample: Mapping[str, Any]) -> None:
    """Raises NotFiniteError where a block of the model overflowed on a document's requests."""
    for arguments in sample["arguments"]:
        ids = harness.tok_encode("".join(arguments))[-harness.max_length :]
        check_overflow(harness.model, torch.tensor([ids]))
