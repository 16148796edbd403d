"""Accuracy of a model in memory on suites of lm-evaluation-harness.

A suite answers, for every document, whether the model was right; those answers stay with the
result, in the order of the documents and with the documents' hashes, so that two models can be
compared document by document. What the harness decides, and we decide otherwise:

- Log-likelihoods are computed in float32. The harness takes the model's type, and in bfloat16 the
  choices of a question tie or swap by rounding alone.
- A log-likelihood that is not finite makes its document's answer NaN, and the accuracy with it.
  The harness takes the first choice, and a broken model scores what the first choice scores.
- A tokenizer that closes every text with an end-of-text token (ByT5) is kept from closing contexts
  with it.
- Nothing is cached: neither requests nor answers, nor data sets that come from files.
"""

import copy
import difflib
import functools
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpq_core.errors import InputError

# Its import puts the questions' code into the version of this module (`digests.code_digest`).
from dpq_core.suites import python_docs

Progress = Callable[[int, int], None]

_SHIPPED = Path(python_docs.__file__).parent
_METRICS = ("acc_norm", "acc")  # in order of preference
_SCORED = ("multiple_choice", "loglikelihood")  # kinds of suites whose answers are right or wrong


class SuiteError(InputError):
    """A suite that cannot be run, with one line that says which and the way out."""


@dataclass(frozen=True)
class SuiteResult:
    suite: str
    metric: str  # acc or acc_norm
    value: float  # percent, 0..100; NaN when any answer is
    documents: int
    correct: list[float]  # a document: 1 right, 0 wrong, NaN no finite log-likelihood
    doc_hashes: list[str]  # SHA-256 of each document, in the order of `correct`


def check_suites(suites: Sequence[str], suites_path: Path | None = None) -> None:
    """Look every name up, without loading data. About 10 s when a suite is not in our folders.

    Raises:
        SuiteError: a name that is unknown or no single score, or a folder that cannot be read.
    """
    with _quiet():
        _index(suites, suites_path)


def evaluate_suites(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[str],
    *,
    suites_path: Path | None = None,
    num_fewshot: int = 0,
    batch_size: int = 16,
    limit: int | None = None,
    prefer_norm: bool = True,
    seed: int = 1234,
    on_progress: Progress | None = None,
) -> dict[str, SuiteResult]:
    """Score `suites` one after the other, on the model's device; results by name.

    Definitions in `suites_path` (YAML) go before ours, and ours before the harness's. A group
    (mmlu) is scored over all documents of its suites, which is the harness's mean by size.
    `batch_size` counts requests (a question's choices), `limit` documents of each suite, `seed`
    chooses few-shot examples (the harness's own default). The model is put into `eval`.
    `on_progress` gets the requests scored and those asked for, of the suite at hand.

    Raises:
        SuiteError: a name that is unknown, a suite whose data cannot be read, that has no accuracy,
            or that is zero-shot by definition when `num_fewshot` is not 0. All are found before
            the first one is scored.
    """
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        manager, from_files = _index(suites, suites_path)
        tasks = {}
        for suite in dict.fromkeys(suites):
            with _data_read_afresh(stack) if suite in from_files else ExitStack():
                tasks[suite] = _load(manager, suite)
        metrics = {suite: _metric(suite, tasks[suite], prefer_norm) for suite in tasks}
        for suite in tasks:
            _set_fewshot(suite, tasks[suite], num_fewshot, seed)
        harness = _harness(model, tokenizer, batch_size, on_progress)
        return {
            suite: _score(harness, suite, tasks[suite], metrics[suite], limit) for suite in tasks
        }


def _index(suites: Sequence[str], suites_path: Path | None) -> tuple[Any, set[str]]:
    """A TaskManager that knows all `suites`, and which of them read definitions of our folders."""
    from lm_eval.tasks import TaskManager  # seconds

    if suites_path is not None:
        _check_folder(suites_path)
    folders = [_SHIPPED, *([suites_path] if suites_path is not None else [])]  # the last wins
    manager = TaskManager(include_path=folders, include_defaults=False)
    index = manager.task_index  # a property, but the very dictionary that names are looked up in
    local = set(index)
    if not all(local.issuperset(_names(index, suite)) for suite in suites):
        for name, entry in _packaged_index().items():
            # A label of ours adds to the harness's: mmlu keeps all subjects when one is redefined.
            index.setdefault(name, entry).tags.update(entry.tags)
    for suite in suites:
        _check_entry(index, suite)
    return manager, {suite for suite in suites if not local.isdisjoint(_names(index, suite))}


@functools.cache
def _packaged_index() -> Mapping[str, Any]:
    """The suites that the harness ships: 14,000 YAML files, read once a process."""
    from lm_eval.tasks import TaskManager

    index: Mapping[str, Any] = TaskManager().task_index
    return index


def _check_folder(folder: Path) -> None:
    """The harness skips files that it cannot parse: the hub's suite of that name would run."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not folder.is_dir():
        raise SuiteError(f"suites_path {folder}: no such folder")
    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of yaml, and missing or circular includes
            reason = " ".join(str(error).split())
            raise SuiteError(f"{path}: not a suite definition: {reason}") from error


def _names(index: Mapping[str, Any], name: str) -> Iterator[str]:
    """A suite's name and those of all suites, groups and labels that it refers to."""
    yield name
    if name not in index:
        return
    entry = index[name]
    listed = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    members = [*(listed if isinstance(listed, list) else [])]
    members += sorted(entry.tags) if entry.kind.name == "TAG" else []
    for member in members:
        known = member if isinstance(member, str) else member.get("group", member.get("task"))
        if isinstance(member, str) or known in index or len(member) == 1:
            yield from _names(index, known)  # else: defined where it stands


def _check_entry(index: Mapping[str, Any], suite: str) -> None:
    if suite not in index:
        near = difflib.get_close_matches(suite, index, n=3, cutoff=0.5)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise SuiteError(f"suite {suite!r} is unknown{hint}")
    entry = index[suite]
    if entry.kind.name == "TAG":
        members = ", ".join(sorted(entry.tags)[:5])
        raise SuiteError(f"{suite!r} is a label of several suites: name them ({members}, …)")
    if entry.kind.name == "GROUP":
        # The mean by size is the only aggregate that is a mean over documents.
        aggregates = entry.cfg.get("aggregate_metric_list") or []
        by_size = [a.get("weight_by_size", True) for a in aggregates]
        if not by_size or not all(by_size):
            raise SuiteError(
                f"group {suite!r} has no mean over its documents: name its suites instead"
            )


def _load(manager: Any, suite: str) -> dict[str, Any]:
    """The suite's tasks by name, with their data: one, or those of a group."""
    try:
        tasks: dict[str, Any] = manager.load([suite])["tasks"]
    except Exception as error:  # of datasets, huggingface_hub, jinja, yaml, the suite's own code
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SuiteError(
            f"suite {suite!r}: its data cannot be read: {reason.rstrip('.')}: where the hub is out"
            " of reach, put a definition of the same name, with dataset_path: json and data_files"
            " of a local or S3 mirror, into suites_path"
        ) from error
    return tasks


def _metric(suite: str, tasks: Mapping[str, Any], prefer_norm: bool) -> str:
    """acc_norm where all tasks define it (and it is preferred), else acc."""
    defined = set.intersection(*(set(task.higher_is_better()) for task in tasks.values()))
    kinds = {task.OUTPUT_TYPE for task in tasks.values()}
    for metric in _METRICS if prefer_norm else reversed(_METRICS):
        if metric in defined and kinds.issubset(_SCORED):
            return metric
    raise SuiteError(
        f"suite {suite!r} has no accuracy: it is {', '.join(sorted(kinds))} with the metrics"
        f" {', '.join(sorted(defined)) or 'none'}"
    )


def _set_fewshot(suite: str, tasks: Mapping[str, Any], num_fewshot: int, seed: int) -> None:
    for task in tasks.values():
        if num_fewshot and task.get_config("num_fewshot") == 0:
            raise SuiteError(f"suite {suite!r} is zero-shot by definition: num_fewshot must be 0")
        task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=seed)


def _harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    on_progress: Progress | None = None,
) -> Any:
    from lm_eval.models.huggingface import HFLM  # seconds

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise SuiteError(
            "the tokenizer has neither a begin-of-text nor an end-of-text token:"
            " lm-evaluation-harness needs one for empty contexts"
        )
    plain = tokenizer.encode("a", add_special_tokens=False)
    closed = tokenizer.encode("a")
    closing = closed[len(closed) - closed[::-1].index(plain[-1]) :]

    class Harness(HFLM):  # type: ignore[misc, unused-ignore]
        """HFLM whose texts stay open, and whose progress is the caller's to show."""

        asked = scored = 0

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            ids: list[int] = super().tok_encode(string, *args, **kwargs)
            return ids[: -len(closing)] if closing and ids[-len(closing) :] == closing else ids

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self.asked, self.scored = len(requests), 0
            return super().loglikelihood(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self.scored += len(inps)
            if on_progress is not None:
                on_progress(self.scored, self.asked)
            return logits

    return Harness(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # which is given a padding token
        batch_size=batch_size,
        softmax_dtype="float32",
    )


def _score(
    harness: Any, suite: str, tasks: dict[str, Any], metric: str, limit: int | None
) -> SuiteResult:
    # Not simple_evaluate: it seeds the process's generators and describes the machine for seconds.
    from lm_eval.evaluator import evaluate

    samples = evaluate(harness, {"tasks": tasks}, limit=limit, bootstrap_iters=0)["samples"]
    ordered = [
        sample
        for name in tasks
        for sample in sorted(samples[name], key=lambda sample: sample["doc_id"])
        if sample["filter"] == samples[name][0]["filter"]
    ]
    correct = [_answer(sample, metric) for sample in ordered]
    return SuiteResult(
        suite=suite,
        metric=metric,
        value=100 * sum(correct) / len(correct),
        documents=len(correct),
        correct=correct,
        doc_hashes=[sample["doc_hash"] for sample in ordered],
    )


def _answer(sample: Mapping[str, Any], metric: str) -> float:
    log_likelihoods = [response[0] for response in sample["filtered_resps"]]
    finite = all(math.isfinite(value) for value in log_likelihoods)
    return float(sample[metric]) if finite else math.nan


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness prints to stdout now and then, and warns of what is meant here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _data_read_afresh(until: ExitStack) -> Iterator[None]:
    """Data sets loaded inside go to a folder of their own, kept until `until` closes.

    `datasets` knows a local file by its name and mtime only, see `dpq_core.data`.
    """
    import datasets

    folder = until.enter_context(tempfile.TemporaryDirectory())
    usual = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(folder)
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = usual
