"""lm-evaluation-harness's own runner on a whole model in memory: what the scorer is held against.

Log-likelihoods in float32 (left to itself it takes the model's type, and in bfloat16 the choices of
a question tie or swap by rounding alone), texts that stay open, and scores as
`dpq_core.evaluation.results` makes them: a log-likelihood that is not finite is NaN.
"""

import copy

from dpq_core.evaluation.open_texts import check_beginning, opened_by
from dpq_core.evaluation.results import in_order, scores_of
from dpq_core.evaluation.suites.definitions import quiet
from dpq_core.model.context import context_of
from dpq_core.model.empty import building


def evaluate_suite(model, tokenizer, suite, batch_size=16, limit=None):
    """Scores of a suite; `limit`: the first documents of each of its tasks."""
    from lm_eval.evaluator import evaluate  # seconds

    quiet()
    harness = harness_of(model, tokenizer, batch_size)
    samples = evaluate(harness, {"tasks": suite.tasks}, limit=limit, bootstrap_iters=0)["samples"]
    return scores_of(suite, in_order(suite, samples), harness.truncated)


def harness_of(model, tokenizer, batch_size=16):
    """HFLM whose texts stay open, and which counts what it cuts."""
    from lm_eval.models.huggingface import HFLM  # seconds

    check_beginning(tokenizer)
    opened = opened_by(tokenizer)

    class Harness(HFLM):
        truncated = 0

        def tok_encode(self, string, *args, **kwargs):
            return opened(super().tok_encode(string, *args, **kwargs))

        def loglikelihood(self, requests, disable_tqdm=False):
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            if override_bs is None:  # not one batch of rolling windows
                window = self.max_length + 1
                self.truncated += sum(len(before) + len(a) > window for _, before, a in requests)
            return super()._loglikelihood_tokens(requests, True, override_bs)

    with building:  # it ties the model's embeddings anew
        return Harness(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # which is given a padding token
            batch_size=batch_size,
            max_length=context_of(model.config.get_text_config()),
            softmax_dtype="float32",
        )
