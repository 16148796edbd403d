"""Tasks on the workers of a Dask cluster: one made on the spot, or one that is there.

Layers, and blocks' calibration and shares of it, say what they take: the recipe's `resources` of a
worker that declares them, and their memory in bytes where workers declare `memory`, as those of the
cluster made on the spot do. Calibration, which layers wait for, goes first; then the larger layers.
Each worker takes a device of its machine that no other has.
A worker that dies is replaced and what it had starts again; what loses its worker four times in a
row fails.
"""

import logging
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self

import dask
import distributed
import psutil
from distributed.diagnostics.plugin import WorkerPlugin
from prefect_dask import DaskTaskRunner

from dpq_core.errors import InputError
from dpq_core.machine.device import share_machine
from dpq_core.recipe import ExecutionSection
from infra.orchestration.tls import share_tls_context
from tasks.support.work import Work
from tasks.support.worker import (
    become_sole_worker,
    device_kind,
    of_a_worker,
    one_arithmetic,
    this_worker,
    visible_devices,
    workers_here,
)

MEMORY = "memory"
_CONNECTING = 60  # s, for a scheduler to answer and a first worker to be there


class ClusterError(InputError):
    """A Dask cluster that does not answer, or has no worker for what a recipe asks."""


class LayersOnDask(DaskTaskRunner):  # type: ignore[misc]
    """Prefect's runner on Dask, which knows what a task takes."""

    execution: ExecutionSection

    @classmethod
    def of(cls, execution: ExecutionSection) -> Self:
        if execution.dask_address:
            runner = cls(address=execution.dask_address, client_kwargs={"timeout": _CONNECTING})
        else:
            runner = cls()
        runner.execution = execution
        return runner

    def duplicate(self) -> Self:
        return type(self).of(self.execution)

    def __reduce__(self) -> tuple[Any, ...]:
        return of_a_worker()

    def __enter__(self) -> Self:
        logging.getLogger("distributed").setLevel(logging.ERROR)
        self._of_workers = self.execution
        if not self.execution.dask_address:
            self._plan_cluster()
        super().__enter__()
        try:
            self._prepare_workers()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _plan_cluster(self) -> None:
        """Processes of this machine. Where GPUs are and `dask-cuda` is installed they are its own
        cluster's, which places a worker's memory and threads near its GPU."""
        execution, workers = self.execution, workers_here(self.execution)
        self.cluster_kwargs = {
            "n_workers": workers,
            "threads_per_worker": 1,
            "resources": {MEMORY: psutil.virtual_memory().total / workers, **execution.resources},
            "memory_limit": None,  # it would pause workers for memory that is not Python's
            "dashboard_address": None,
        }
        self.resolved_cluster_class = distributed.LocalCluster
        if device_kind(execution) == "cuda" and find_spec("dask_cuda"):
            self.resolved_cluster_class = import_module("dask_cuda").LocalCUDACluster
            self.cluster_kwargs["CUDA_VISIBLE_DEVICES"] = visible_devices(execution)
            # Each of its workers sees these in an order of its own: what is first there is its own.
            self._of_workers = execution.model_copy(update={"device": "cuda", "devices": "auto"})

    def _prepare_workers(self) -> None:
        address = self.execution.dask_address
        try:
            self.client.wait_for_workers(1, timeout=_CONNECTING)
        except (OSError, TimeoutError) as error:
            raise ClusterError(
                f"execution.dask_address: {address}: no scheduler with a worker answered for"
                f" {_CONNECTING} s: start `dask scheduler` and `dask worker`"
            ) from error
        self._declared = self._largest_resources()
        for name, amount in self.execution.resources.items():
            if self._declared.get(name, 0) < amount:
                raise ClusterError(
                    f"execution.resources: a layer takes {name}: {amount:g}, and the most that a"
                    f" worker of {address} declares is {self._declared.get(name, 0):g}:"
                    f" start workers with --resources {name}={amount:g}"
                )
        self.client.register_plugin(_Begin(self._of_workers))
        one_arithmetic(self.client.run(_arithmetic, self._of_workers))

    def _largest_resources(self) -> dict[str, float]:
        """The most that any one worker declares, by resource."""
        largest: dict[str, float] = {}
        for worker in self.client.scheduler_info(n_workers=-1)["workers"].values():
            for name, amount in worker["resources"].items():
                largest[name] = max(amount, largest.get(name, 0))
        return largest

    def submit(self, task: Any, parameters: Mapping[str, Any], *others: Any, **more: Any) -> Any:
        work = next((each for each in parameters.values() if isinstance(each, Work)), None)
        if work is None:
            return super().submit(task, parameters, *others, **more)
        resources = dict(self.execution.resources)
        if MEMORY in self._declared:  # what is larger than that still runs, alone
            resources[MEMORY] = min(work.memory, self._declared[MEMORY])
        with dask.annotate(resources=resources, priority=work.priority):
            return super().submit(task, parameters, *others, **more)


class _Begin(WorkerPlugin):  # type: ignore[misc]
    """Settles each worker, those started later too, for work beside others, and has it take a
    device that no other worker of its machine has."""

    name = "dpq-worker"

    def __init__(self, execution: ExecutionSection) -> None:
        self._execution = execution

    def setup(self, worker: distributed.Worker) -> None:
        share_machine(self._execution.threads_per_worker)
        share_tls_context()
        become_sole_worker(self._execution)


def _arithmetic(execution: ExecutionSection) -> str:
    return this_worker(execution).arithmetic
