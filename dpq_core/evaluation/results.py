"""From log-likelihoods to scores: by lm-evaluation-harness's own evaluation of each document."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dpq_core.evaluation.perplexity import window_scores
from dpq_core.evaluation.scores import PERPLEXITY, Scores
from dpq_core.evaluation.suites.definitions import Suite, quiet

Sample = Mapping[str, Any]  # what lm-eval keeps of a document
Answer = tuple[float, bool]  # log-likelihood, and whether the continuation is the greedy one


def suite_scores(
    suite: Suite, answers: Sequence[Answer], truncated: int = 0, limit: int | None = None
) -> Scores:
    """Scores of a suite from the answer to each of its requests (`requests.Encoder`). A document
    with a log-likelihood that is not finite is NaN, and the accuracy with it: the harness takes the
    first choice then, and a broken model scores what the first choice scores."""
    from lm_eval.evaluator import evaluate  # seconds

    quiet()
    harness = _answering(answers)
    samples = evaluate(harness, {"tasks": suite.tasks}, limit=limit, bootstrap_iters=0)["samples"]
    return scores_of(suite, in_order(suite, samples), truncated)


def in_order(suite: Suite, samples: Mapping[str, list[Sample]]) -> list[tuple[str, Sample]]:
    """Task and sample of each document, in the suite's order, by the first of the task's
    filters."""
    return [
        (name, sample)
        for name in suite.tasks
        for sample in sorted(samples[name], key=lambda sample: sample["doc_id"])
        if sample["filter"] == samples[name][0]["filter"]
    ]


def scores_of(suite: Suite, ordered: Sequence[tuple[str, Sample]], truncated: int) -> Scores:
    """Scores of documents in order. One with a log-likelihood that is not finite is NaN."""
    pairs = [_value(sample, suite) for _, sample in ordered]
    picks = [_pick(sample, suite.tasks[name], suite.kind) for name, sample in ordered]
    kept = [pick for pick in picks if pick is not None] if all(picks) else []
    groups = {name: _label(task) for name, task in suite.tasks.items()}
    return Scores(
        metric=suite.kind,
        truncated=truncated,
        documents=[sample["doc_hash"] for _, sample in ordered],
        parts=[name for name, _ in ordered],
        groups=[groups[name] for name, _ in ordered],
        values=[value for value, _ in pairs],
        weights=[weight for _, weight in pairs],
        picks=[pick for pick, _ in kept],
        margins=[margin for _, margin in kept],
    )


def perplexity_scores(
    windows: Tensor,  # [windows, length] int64
    answers: Sequence[Answer],
    metric: str = PERPLEXITY,
) -> Scores:
    """Scores of perplexity's windows, as `dpq_core.evaluation.perplexity` gives them."""
    return window_scores(windows, [-log_likelihood for log_likelihood, _ in answers], metric)


def _answering(answers: Sequence[Answer]) -> Any:
    from lm_eval.api.model import LM  # seconds

    class Answering(LM):  # type: ignore[misc, unused-ignore]
        """Has the answers already, in the order in which the harness asks."""

        def loglikelihood(self, requests: list[Any]) -> list[Answer]:
            return self._all(requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [log_likelihood for log_likelihood, _ in self._all(requests)]

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError("suites that generate text have no scores here")

        def _all(self, requests: list[Any]) -> list[Answer]:
            if len(requests) != len(answers):
                raise ValueError(f"{len(answers)} answers to {len(requests)} requests of a suite")
            return list(answers)

    return Answering()


def _value(sample: Mapping[str, Any], suite: Suite) -> tuple[float, float]:
    """Value and weight of a document, as in `dpq_core.evaluation.scores`."""
    if suite.kind == "perplexity_word":
        log_likelihood, words = sample[suite.metric]
        return -float(log_likelihood), float(words)
    finite = all(math.isfinite(response[0]) for response in sample["filtered_resps"])
    return (float(sample[suite.metric]) if finite else math.nan), 1.0


def _pick(sample: Sample, task: Any, kind: str) -> tuple[int, float] | None:
    """The number of the choice that was picked, the first of equals, and its margin above the next:
    by log-likelihoods as lm-eval's `acc` and `acc_norm` compare them. -1 and NaN where one is not
    finite; None where a document has no choices, or its task has a rule of its own."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.config.process_results:
        return None
    choices = task.doc_to_choice(sample["doc"])
    found = np.array([response[0] for response in sample["filtered_resps"][: len(choices)]])
    if kind == "acc_norm":
        found = found / [len(choice) for choice in choices]
    if len(found) < 2 or not np.isfinite(found).all():
        return -1, math.nan
    highest, next_one = np.sort(found)[::-1][:2]
    return int(np.argmax(found)), float(highest - next_one)


def _label(task: Any) -> str:
    """The first of a task's labels: MMLU's categories."""
    tag = task.get_config("tag")
    return (tag[0] if tag else "") if isinstance(tag, list) else tag or ""
