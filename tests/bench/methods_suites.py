"""lm-evaluation-harness's requests as arrays, for machines that have no harness (`methods_score`).

Every suite is run once by the harness with a model that answers the number of each request instead
of its log-likelihood: what comes back with a document says which requests are its, and in which
order. The right choice is found by asking the suite itself: it gets results in which one choice is
the likeliest, choice by choice.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from dpq_core.evaluation.suites.definitions import Suite, quiet

SUITES = (
    "hellaswag", "lambada_openai", "boolq", "arc_easy", "piqa", "winogrande", "arc_challenge",
    "openbookqa", "mmlu",
)  # fmt: skip


class Collected:
    """Columns of `methods_score.Suites` as they grow."""

    def __init__(self) -> None:
        self.sequences: dict[tuple[int, ...], int] = {}
        self.requests: list[tuple[int, list[int]]] = []  # sequence, goals
        self.norms: list[int] = []
        self.documents: list[tuple[int, int, int, int]] = []  # last, right, suite, place
        self.normed: list[bool] = []

    def arrays(self) -> dict[str, np.ndarray]:
        narrow = np.int32 if any(max(s) >= 1 << 16 for s in self.sequences) else np.uint16
        goals = [goal for _, own in self.requests for goal in own]
        last, right, suite, place = np.array(self.documents, np.int32).T
        return {
            "tokens": np.concatenate([np.array(s, narrow) for s in self.sequences]),
            "ends": np.cumsum([len(s) for s in self.sequences], dtype=np.int32),
            "sequence": np.array([s for s, _ in self.requests], np.int32),
            "goals": np.array(goals, narrow),
            "goal_ends": np.cumsum([len(own) for _, own in self.requests], dtype=np.int32),
            "norms": np.array(self.norms, np.int16),
            "last": last, "right": right.astype(np.int8),
            "suite": suite.astype(np.int8), "place": place,
            "normed": np.array(self.normed),
        }  # fmt: skip


def arrays_of(
    model: PreTrainedModel,
    tokenizer: Any,
    suites: Mapping[str, Suite],
    limits: Mapping[str, int | None],
) -> dict[str, np.ndarray]:
    """All suites' requests by a model's tokenizer, as `methods_score.Suites` reads them. limits:
    first documents of each of a suite's tasks."""
    collected = Collected()
    quiet()
    for number, suite in enumerate(suites.values()):
        _collect(collected, number, suite, _listener(model, tokenizer), limits.get(suite.name))
    return {"names": np.array(list(suites)), **collected.arrays()}


def _listener(model: PreTrainedModel, tokenizer: Any) -> Any:
    """The reference's harness, whose model answers with numbers of requests."""
    from reference_harness import harness_of

    own = harness_of(model, tokenizer, 1)
    own.heard = []

    def answered(requests: Any, *_: Any, **__: Any) -> list[tuple[float, bool]]:
        first = len(own.heard)
        own.heard += [(before, after) for _, before, after in requests]
        return [(float(first + number), True) for number in range(len(requests))]

    own._loglikelihood_tokens = answered
    return own


def _collect(
    collected: Collected, number: int, suite: Suite, listener: Any, limit: int | None
) -> None:
    from lm_eval.evaluator import evaluate

    samples = evaluate(listener, {"tasks": suite.tasks}, limit=limit, bootstrap_iters=0)["samples"]
    collected.normed.append(suite.kind == "acc_norm")
    for name, task in suite.tasks.items():
        kept = [each for each in samples[name] if each["filter"] == samples[name][0]["filter"]]
        for place, sample in enumerate(sorted(kept, key=lambda each: each["doc_id"])):
            asked = [int(response[0]) for response in sample["filtered_resps"]]
            for request in asked:
                before, after = listener.heard[request]
                read = tuple([*before, *after][-(listener.max_length + 1) :][:-1])
                sequence = collected.sequences.setdefault(read, len(collected.sequences))
                collected.requests.append((sequence, list(after)))
            collected.norms += _characters(task, sample["doc"], len(asked))
            right = _right(task, sample["doc"], len(asked), suite.metric)
            collected.documents.append((len(collected.requests), right, number, place))


def _characters(task: Any, document: Any, count: int) -> list[int]:
    choices = task.doc_to_choice(document) if task.OUTPUT_TYPE == "multiple_choice" else [""]
    return [len(choice) or 1 for choice in choices] if len(choices) == count else [1] * count


def _right(task: Any, document: Any, count: int, metric: str) -> int:
    """Of a document's choices; -1 where the one continuation must be the likeliest."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return -1
    for choice in range(count):
        results = [(-1.0 if other == choice else -1e9, False) for other in range(count)]
        if task.process_results(document, results)[metric] == 1:
            return choice
    raise ValueError(f"no choice of {document} is right")
