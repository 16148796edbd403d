"""The flows as they are deployed: their parameters are a form, their ends states with a name.

A run that ended with a verdict is `Completed` under the name `Promoted`, `Rejected`, `Inspected` or
`Withheld`; the state's message has the reasons, a line each, and the run's labels what it made
(`infra.orchestration.client`). Automations go by the same names.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.states import Completed

from dpq_core.recipe import DeviceKind, ExecutionSection
from flows.by_name import flow_named
from flows.deployments.doors import check_source
from flows.deployments.form import Overrides, RecipeName, admitted
from flows.running.runners import task_runner
from infra.orchestration.client import label

_AS_IT_IS = Overrides()
_NONE: list[str] = []


@flow(name="release")
def release(
    recipe: RecipeName = "quickstart", overrides: Overrides = _AS_IT_IS, settings: list[str] = _NONE
) -> State[None]:
    """Quantize a model, measure it against the 16-bit original, and promote it within the gates.

    Args:
        recipe: a shipped one by name, or a file in a folder of DPQ_RECIPE_ROOTS
        overrides: common fields; what is left empty stays as the recipe says
        settings: key.path=value of any further field that is open
    """
    asked = admitted(recipe, [*overrides.settings(), *settings])
    with _running_on(asked.execution):
        done = flow_named("release").fn(asked)
    registration, verdict = done.registration, done.verdict
    label(
        {
            "registered_model": registration.name,
            "model_version": registration.version,
            "run_id": done.run_id,
            "checkpoint": done.checkpoint,
        }
    )
    return Completed(name=verdict.verdict.capitalize(), message="\n".join(verdict.reasons))


@flow(name="evaluate")
def evaluate(
    checkpoint: str,
    against: str | None = None,
    recipe: RecipeName = "quickstart",
    overrides: Overrides = _AS_IT_IS,
    settings: list[str] = _NONE,
) -> State[None]:
    """Measure any checkpoint by a recipe's evaluation, alone or against another.

    Args:
        checkpoint: hub id or folder; 16 bits or quantized
        against: baseline to compare with, document by document
        recipe: a shipped one by name, or a file in a folder of DPQ_RECIPE_ROOTS
        overrides: common fields; what is left empty stays as the recipe says
        settings: key.path=value of any further field that is open
    """
    asked = admitted(recipe, [*overrides.settings(), *settings])
    check_source("checkpoint", checkpoint)
    check_source("against", against)
    with _running_on(asked.execution):
        report = flow_named("evaluate").fn(asked, checkpoint, against)
    label({"run_id": report.run_id, "checkpoint": checkpoint})
    return Completed(message="\n".join(report.reasons))


@flow(name="compare")
def compare(
    recipe: RecipeName = "quickstart", overrides: Overrides = _AS_IT_IS, settings: list[str] = _NONE
) -> State[None]:
    """The ladder: the same model under several schemes, one row each.

    Args:
        recipe: a shipped one by name, or a file in a folder of DPQ_RECIPE_ROOTS
        overrides: common fields; what is left empty stays as the recipe says
        settings: key.path=value of any further field that is open
    """
    asked = admitted(recipe, [*overrides.settings(), *settings])
    with _running_on(asked.execution):
        rows = flow_named("compare").fn(asked)
    return Completed(message="\n".join(f"{row.variant}: {row.error}" for row in rows if row.error))


@flow(name="benchmark")
def benchmark(
    device: DeviceKind = "cpu",
    shape: str | None = None,
    checkpoint: str | None = None,
    recipe: RecipeName = "quickstart",
    overrides: Overrides = _AS_IT_IS,
    settings: list[str] = _NONE,
) -> State[None]:
    """Time BF16, FP8, W4A16 and W4A8 of one model on this worker's device.

    Args:
        device: kind of device; the queue says which worker has one
        shape: llama-160m, llama-1b or llama-3-8b with random weights, in place of the model
        checkpoint: folder of the model's native checkpoint, to be timed as W4A8
        recipe: a shipped one by name, or a file in a folder of DPQ_RECIPE_ROOTS
        overrides: common fields; what is left empty stays as the recipe says
        settings: key.path=value of any further field that is open
    """
    asked = admitted(recipe, [*overrides.settings(), *settings])
    check_source("checkpoint", checkpoint)
    with _running_on(asked.execution):
        done = flow_named("benchmark").fn(asked, [device], shape, checkpoint)
    label({"run_id": done.run_id, "log": done.log})
    return Completed(message="\n".join(each.wrong for each in done.devices if each.wrong))


@contextmanager
def _running_on(execution: ExecutionSection) -> Iterator[None]:
    """Run the present flow's tasks where the recipe says: a deployment's runner is chosen before
    its recipe is known."""
    context = FlowRunContext.get()
    assert context is not None
    runner = task_runner(execution)
    with runner, context.model_copy(update={"task_runner": runner}):
        yield
