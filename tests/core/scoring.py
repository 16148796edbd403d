"""The product's scores of a model in memory, which stays as it is."""

import copy

from dpq_core.evaluation.forest import chunks_of
from dpq_core.evaluation.requests import Encoder, asked_of_windows
from dpq_core.evaluation.results import perplexity_scores, suite_scores
from dpq_core.evaluation.scorer import answers, score
from dpq_core.evaluation.subject import in_memory


def evaluate_suite(model, tokenizer, suite, limit=None):
    asked = Encoder(tokenizer, model.config).requests_of(suite, limit)
    found = answers(
        score(in_memory(copy.deepcopy(model)), list(chunks_of(asked.asked))), asked.count
    )
    return suite_scores(suite, found, asked.truncated, limit)


def perplexity(model, windows):
    chunks = list(chunks_of(asked_of_windows(windows)))
    found = answers(score(in_memory(copy.deepcopy(model)), chunks), len(windows))
    return perplexity_scores(windows, found)
