"""Run the measurements of a recipe on one checkpoint, a task each."""

from collections import deque
from collections.abc import Callable
from functools import partial

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture

from dpq_core.recipe import Recipe
from dpq_core.verdict.pairing import Failure
from flows.quantize import worker_lost
from infra.store import ArtifactRef, StoreError
from tasks.evaluate import EvaluationData, Measured, Subject, measurements


def measure(recipe: Recipe, data: EvaluationData, subject: Subject) -> Measured:
    """Scores of all that the recipe's evaluation names; one that fails says why, and the others go
    on. To be called inside a flow with `task_runner(…)`.

    Raises:
        StoreError: scores that could not be stored: a full disk is no failure of the model.

    At most `evaluation.workers` run at a time: each loads the model.
    """
    tasks = measurements(recipe, data)
    waiting: deque[tuple[str, _Submit, PrefectFuture[ArtifactRef]]] = deque()
    measured: dict[str, ArtifactRef | Failure] = {}

    def finish_one() -> None:
        name, submit, future = waiting.popleft()
        measured[name] = _found(future, submit)

    for name, (task, arguments) in tasks.items():
        if len(waiting) == recipe.evaluation.workers:
            finish_one()
        submit = partial(task.submit, recipe, subject, *arguments)
        waiting.append((name, submit, submit()))
    while waiting:
        finish_one()
    return measured


_Submit = Callable[[], PrefectFuture[ArtifactRef]]
_STARTS = 3


def _found(future: PrefectFuture[ArtifactRef], submit: _Submit) -> ArtifactRef | Failure:
    """What a task found, or why it did not; one whose worker was killed too."""
    try:
        return _outcome(_ended(future, submit))
    except Exception as error:
        if not worker_lost(error):
            raise
        return Failure(
            "failed: its worker was killed, for lack of memory perhaps: lower evaluation.workers"
            " or evaluation.batch_size"
        )


def _ended(future: PrefectFuture[ArtifactRef], submit: _Submit) -> State[ArtifactRef]:
    """How a task ended. One that found no server when it was to begin comes back as it was, and is
    submitted again."""
    for _ in range(_STARTS - 1):
        future.wait()
        if future.state.is_final():
            break
        future = submit()
    future.wait()
    return future.state


def _outcome(state: State[ArtifactRef]) -> ArtifactRef | Failure:
    if not state.is_final():
        name = state.type.value.lower()
        return Failure(
            f"did not begin in {_STARTS} attempts, and is {name}: {state.message or '-'}"
        )
    result = state.result(raise_on_failure=False)
    if isinstance(result, ArtifactRef):
        return result
    if isinstance(result, StoreError):  # no fault of the model
        raise result
    said = " ".join(str(result or state.message).split())
    kind = f"{type(result).__name__}: " if isinstance(result, BaseException) else ""
    return Failure(f"{state.type.value.lower()}: {kind}{said}")
