"""Tasks on the workers of a Dask cluster: one made on the spot, or one that is there.

Layers, and shares of a block's calibration, say what they take: the recipe's `resources` of a
worker that declares them, and their memory in bytes where workers declare `memory`, as those of the
cluster made on the spot do. Calibration, which layers wait for, goes first; then the larger layer.
A worker that dies is replaced and what it had starts again; what loses its worker four times in a
row fails.
"""

import logging
from collections.abc import Mapping
from typing import Any, Self

import dask
import distributed
import psutil
from distributed.diagnostics.plugin import WorkerPlugin
from prefect_dask import DaskTaskRunner

from dpq_core.device import share_machine
from dpq_core.errors import InputError
from dpq_core.footprint import layer_bytes
from dpq_core.plan import PlannedLayer
from dpq_core.recipe import ExecutionSection
from tasks.calibrate import Share

MEMORY = "memory"
_FIRST = 1 << 60  # priority: more than any layer's weights
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
            memory = psutil.virtual_memory().total / execution.workers
            runner = cls(
                cluster_kwargs={
                    "n_workers": execution.workers,
                    "threads_per_worker": 1,
                    "resources": {MEMORY: memory, **execution.resources},
                    "memory_limit": None,  # it would pause workers for memory that is not Python's
                    "dashboard_address": None,
                }
            )
        runner.execution = execution
        return runner

    def duplicate(self) -> Self:
        return type(self).of(self.execution)

    def __enter__(self) -> Self:
        logging.getLogger("distributed").setLevel(logging.ERROR)
        super().__enter__()
        try:
            self._prepare_workers()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

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
        self.client.register_plugin(_Threads(self.execution.threads_per_worker))

    def _largest_resources(self) -> dict[str, float]:
        """The most that any one worker declares, by resource."""
        largest: dict[str, float] = {}
        for worker in self.client.scheduler_info(n_workers=-1)["workers"].values():
            for name, amount in worker["resources"].items():
                largest[name] = max(amount, largest.get(name, 0))
        return largest

    def submit(self, task: Any, parameters: Mapping[str, Any], *others: Any, **more: Any) -> Any:
        layer, share = parameters.get("layer"), parameters.get("share")
        if isinstance(layer, PlannedLayer):
            memory, priority = layer_bytes(layer), layer.weights
        elif isinstance(share, Share):
            memory, priority = share.memory, _FIRST
        else:
            return super().submit(task, parameters, *others, **more)
        resources = dict(self.execution.resources)
        if MEMORY in self._declared:  # what is larger than that still runs, alone
            resources[MEMORY] = min(memory, self._declared[MEMORY])
        with dask.annotate(resources=resources, priority=priority):
            return super().submit(task, parameters, *others, **more)


class _Threads(WorkerPlugin):  # type: ignore[misc]
    """Settles each worker, those started later too, for work beside others."""

    name = "dpq-threads"
    idempotent = True

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def setup(self, worker: distributed.Worker) -> None:
        share_machine(self._threads)
