"""Run the measurements of a recipe on one checkpoint: all chunks of tokens first, in parts, a task
each; then a task for each metric, which adds up what its chunks scored."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.tasks import Task

from dpq_core.errors import InputError
from dpq_core.evaluation.scores import PERPLEXITY
from dpq_core.evaluation.text_divergence import DIVERGENCE
from dpq_core.recipe import Recipe
from dpq_core.verdict.pairing import Failure
from flows.quantize import worker_lost
from infra.store import StoreError
from tasks.evaluate import (
    EvaluationData,
    Measured,
    chunks_asked,
    find_scores,
    kept_of,
    measure_divergence,
    measure_perplexity,
    measure_suite,
)
from tasks.score import portions_of, score
from tasks.support.chunks import ChunkRef, Comparison, Subject


def measure(
    recipe: Recipe, data: EvaluationData, subject: Subject, comparison: Comparison | None = None
) -> Measured:
    """Scores of all that the recipe's evaluation names; one that fails says why, and the others go
    on. To be called inside a flow with `task_runner(…)`. comparison: what is wanted of the
    perplexity windows besides: a divergence stands beside the scores, under its name.

    Raises:
        StoreError: scores that could not be stored: a full disk is no failure of the model.
    """
    comparison = comparison or Comparison()
    failed = _score_chunks(recipe, data, subject, comparison)
    submits: dict[str, _Submit] = {}
    for metric in data.requests:
        if metric not in failed:
            one = [] if metric == PERPLEXITY else [metric]
            measuring = _with_retries(recipe, measure_suite if one else measure_perplexity)
            submits[metric] = partial(measuring.submit, recipe, subject, data, *one)
    other = comparison.reference
    if other and PERPLEXITY in submits:
        diverging = _with_retries(recipe, measure_divergence)
        submits[DIVERGENCE] = partial(diverging.submit, recipe, subject, data, other)
    found = _all(submits)
    names = [*data.requests, *([DIVERGENCE] if DIVERGENCE in found else [])]
    return {name: failed.get(name) or found[name] for name in names}


def _score_chunks(
    recipe: Recipe, data: EvaluationData, subject: Subject, comparison: Comparison
) -> dict[str, Failure]:
    """Have the chunks scored that are missing; the metrics of those that still are, and why."""
    missing = list(_missing(recipe, data, subject, comparison))
    portions = {each.title: each for each in portions_of(recipe, subject, missing)}
    scoring = _with_retries(recipe, score)
    outcomes = _all(
        {
            title: partial(scoring.submit, recipe, subject, portion, comparison)
            for title, portion in portions.items()
        }
    )
    kept = kept_of(recipe, subject, data, comparison)
    return {
        chunk.metric: outcome
        for title, outcome in outcomes.items()
        if isinstance(outcome, Failure)
        for chunk in portions[title].chunks
        if kept.missing(chunk)
    }


def _missing(
    recipe: Recipe, data: EvaluationData, subject: Subject, comparison: Comparison
) -> Iterator[ChunkRef]:
    kept = kept_of(recipe, subject, data, comparison)
    for metric in data.requests:
        scored = find_scores(recipe, subject, data, metric) is not None
        for chunk in chunks_asked(data, metric, comparison, kept.store):
            if kept.missing(chunk, scores=not scored):
                yield chunk


def _with_retries(recipe: Recipe, task: Task[..., Any]) -> Task[..., Any]:
    return task.with_options(
        retries=recipe.evaluation.retries, retry_condition_fn=_may_pass_next_time
    )


def _may_pass_next_time(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Whether a retry can help: not where the input is what is wrong, or time or space was not
    enough."""
    return not isinstance(
        state.result(raise_on_failure=False), InputError | TimeoutError | StoreError
    )


def _all(submits: dict[str, "_Submit"]) -> dict[str, Any]:
    """What tasks found, or why they did not, by name; all run at a time that the runner lets."""
    futures = {name: submit() for name, submit in submits.items()}
    return {name: _found(future, submits[name]) for name, future in futures.items()}


_Submit = Callable[[], PrefectFuture[Any]]
_STARTS = 3


def _found(future: PrefectFuture[Any], submit: _Submit) -> Any:
    """What a task found, or why it did not; one whose worker was killed too."""
    try:
        return _outcome(_ended(future, submit))
    except Exception as error:
        if not worker_lost(error):
            raise
        return Failure(
            "failed: its worker was killed, for lack of memory perhaps: lower execution.workers"
        )


def _ended(future: PrefectFuture[Any], submit: _Submit) -> State[Any]:
    """How a task ended. One that found no server when it was to begin comes back as it was, and is
    submitted again."""
    for _ in range(_STARTS - 1):
        future.wait()
        if future.state.is_final():
            break
        future = submit()
    future.wait()
    return future.state


def _outcome(state: State[Any]) -> Any:
    if not state.is_final():
        name = state.type.value.lower()
        return Failure(
            f"did not begin in {_STARTS} attempts, and is {name}: {state.message or '-'}"
        )
    result = state.result(raise_on_failure=False)
    if state.is_completed():
        return result
    if isinstance(result, StoreError):  # no fault of the model
        raise result
    said = " ".join(str(result or state.message).split())
    kind = f"{type(result).__name__}: " if isinstance(result, BaseException) else ""
    return Failure(f"{state.type.value.lower()}: {kind}{said}")
