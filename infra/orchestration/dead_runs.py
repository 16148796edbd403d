"""Runs whose process died without a word: found by the next run, and marked.

Each run says which process it belongs to: in MLflow by the tag `dpq.process`, in Prefect by a label
of the same name. What a process of another machine left is marked once it gives no more signs of
life under the same `DPQ_HOME`; of those that have another home we know nothing.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.context import FlowRunContext
from prefect.states import Crashed

from infra.registry.tracking import mlflow_client
from infra.store.owners import PROCESS, Attendance, Owner

if TYPE_CHECKING:
    from mlflow.entities import Run

_PAGE = 100
_UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.PAUSED]


def label_flow_run(owner: Owner) -> None:
    """Say on the present flow run's page which process it is; nothing outside of a flow."""
    context = FlowRunContext.get()
    if context and context.flow_run:
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(context.flow_run.id, {PROCESS: str(owner)})


def mark_dead_runs(tracking_uri: str, attendance: Attendance) -> None:
    """MLflow's runs of dead processes become FAILED, Prefect's crashed, with their tasks."""
    client = mlflow_client(tracking_uri)
    for run in _running_in_mlflow(tracking_uri):
        owner = Owner.parse(run.data.tags[PROCESS])
        if owner and attendance.dead(owner):
            client.set_tag(run.info.run_id, "died", _said(owner))
            client.set_terminated(run.info.run_id, "FAILED")
    with get_client(sync_client=True) as prefect:
        for flow_run in _running_in_prefect(prefect):
            owner = Owner.parse(str(flow_run.labels.get(PROCESS, "")))
            if owner and attendance.dead(owner):
                _mark_crashed(prefect, flow_run.id, _said(owner))
    attendance.forget_the_dead()


def _said(owner: Owner) -> str:
    return f"{owner.shown} died; found by process {os.getpid()}"


def _running_in_mlflow(tracking_uri: str) -> "Iterator[Run]":
    client = mlflow_client(tracking_uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    token: str | None = None
    while True:
        wanted = f"attributes.status = 'RUNNING' AND tags.`{PROCESS}` LIKE '%'"
        page = client.search_runs(experiments, wanted, max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _running_in_prefect(client: SyncPrefectClient) -> list[FlowRun]:
    """All at once: the pages of a filter that we change the answer of would have gaps."""
    unfinished = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED))
    )
    found: list[FlowRun] = []
    while True:
        page = client.read_flow_runs(flow_run_filter=unfinished, limit=_PAGE, offset=len(found))
        found += page
        if len(page) < _PAGE:
            return found


def _mark_crashed(client: SyncPrefectClient, flow_run_id: UUID, message: str) -> None:
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])),
        task_run_filter=TaskRunFilter(
            state=TaskRunFilterState(type=TaskRunFilterStateType(any_=_UNFINISHED))
        ),
        limit=_PAGE,
    )
    for task in tasks:
        client.set_task_run_state(task.id, Crashed(message=message), force=True)
    client.set_flow_run_state(flow_run_id, Crashed(message=message), force=True)
