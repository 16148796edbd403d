"""Run the measurements of a recipe on one checkpoint, a task each."""

from collections import deque

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture

from dpq_core.pairing import Failure
from dpq_core.recipe import Recipe
from infra.store import ArtifactRef, StoreError
from tasks.evaluate import EvaluationData, Measured, Subject, measurements
from tasks.progress import stepper


def measure(recipe: Recipe, data: EvaluationData, subject: Subject) -> Measured:
    """Scores of all that the recipe's evaluation names; one that fails says why, and the others go
    on. To be called inside a flow with `task_runner(…)`.

    Raises:
        StoreError: scores that could not be stored: a full disk is no failure of the model.

    At most `evaluation.workers` run at a time: each loads the model.
    """
    tasks = measurements(recipe, data)
    step = stepper(f"evaluate {subject.role}", len(tasks))
    waiting: deque[tuple[str, PrefectFuture[ArtifactRef]]] = deque()
    measured: dict[str, ArtifactRef | Failure] = {}

    def finish_one() -> None:
        name, future = waiting.popleft()
        future.wait()
        measured[name] = _outcome(future.state)
        step()

    for name, (task, arguments) in tasks.items():
        if len(waiting) == recipe.evaluation.workers:
            finish_one()
        waiting.append((name, task.submit(recipe, subject, *arguments)))
    while waiting:
        finish_one()
    return measured


def _outcome(state: State[ArtifactRef]) -> ArtifactRef | Failure:
    result = state.result(raise_on_failure=False)
    if isinstance(result, ArtifactRef):
        return result
    if isinstance(result, StoreError):  # no fault of the model
        raise result
    said = " ".join(str(result or state.message).split())
    kind = f"{type(result).__name__}: " if isinstance(result, BaseException) else ""
    return Failure(f"{state.type.value.lower()}: {kind}{said}")
