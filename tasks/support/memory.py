"""Memory and disk: whether there is enough before a run, and what was used beside what was said."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from dpq_core.errors import InputError
from dpq_core.evaluation.room import Room
from dpq_core.footprint import Footprint
from dpq_core.recipe import ExecutionSection, Recipe
from infra.care import stored
from infra.memory import Peaks, available_memory
from infra.store import Store
from infra.store.disk import shown_bytes
from tasks.support.worker import Worker, workers_here


class RoomError(InputError):
    """Too little memory or disk for what a recipe asks."""


@dataclass(frozen=True)
class MemoryUse:
    """Peaks of a stage in bytes, as predicted and as used; of a worker process: 0 where
    threads of the process itself do the work, and the use None where that is elsewhere; of a
    worker's device: 0 and None where that has no memory of its own."""

    predicted: int
    used: int
    worker_predicted: int = 0
    worker_used: int | None = None
    device_predicted: int = 0
    device_used: int | None = None

    @classmethod
    def of(
        cls, recipe: Recipe, needed: Footprint | Room, peaks: Peaks, device_peak: int | None
    ) -> "MemoryUse":
        """device_peak: the most that any worker had of its device, if anybody knows."""
        execution, device = recipe.execution, needed.device
        if execution.runner == "threads":
            together = needed.together(workers_here(execution))
            return cls(
                predicted=peaks.start + together,
                used=peaks.process,
                device_predicted=device,
                device_used=device_peak,
            )
        return cls(
            predicted=peaks.start,  # workers do all that takes memory
            used=peaks.process,
            worker_predicted=peaks.start + needed.worker,
            worker_used=peaks.worker or None,
            device_predicted=device,
            device_used=device_peak,
        )

    @property
    def line(self) -> str:
        """For people."""
        text = f"{shown_bytes(self.used)} of {shown_bytes(self.predicted)} predicted"
        if self.worker_predicted:
            text += f"; a worker {_shown(self.worker_used)} of {shown_bytes(self.worker_predicted)}"
        if self.device_predicted:
            text += f"; a device {_shown(self.device_used)} of {shown_bytes(self.device_predicted)}"
        return text

    def as_metrics(self, prefix: str = "memory") -> dict[str, float]:
        """For MLflow: megabytes, what is known."""
        found = {f"{prefix}.{name}_mb": value for name, value in asdict(self).items()}
        return {name: value / 1e6 for name, value in found.items() if value}


def _shown(used: int | None) -> str:
    return "unknown" if used is None else shown_bytes(used)


def check_room(recipe: Recipe, needed: Footprint, store: Store, worker: Worker) -> None:
    """Enough disk for the store, enough memory here for what runs here, and enough of every
    worker's device.

    What other machines have for themselves is not known here. What the store has already is not
    needed again, perhaps: it counts as room.

    Raises:
        RoomError: naming what is needed, what there is, and the way out.
    """
    execution = recipe.execution
    if execution.scratch:
        _check_disk("scratch", Store(execution.scratch), "statistics", needed.statistics)
        _check_disk("store", store, "layers and the checkpoint", needed.disk - needed.statistics)
    else:
        what = "calibration statistics, layers and the checkpoint"
        _check_disk("store", store, what, needed.disk)
    if worker.memory is not None and needed.device > worker.memory:
        raise RoomError(
            f"execution.device: {worker.name}: a layer, or a block's calibration, takes up to"
            f" {shown_bytes(needed.device)} of it, and {shown_bytes(worker.memory)} are there:"
            " lower calibration.batch_size, or choose devices with more memory, or cpu"
        )
    if execution.dask_address:
        return
    wanted, available = _memory_here(execution, needed), available_memory()
    if wanted > available:
        raise RoomError(
            f"execution.workers: {workers_here(execution)}: a layer takes"
            f" {shown_bytes(needed.layer)}, calibration of a block"
            f" {shown_bytes(max(needed.block, needed.share))}, {shown_bytes(wanted)} in all,"
            f" and {shown_bytes(available)} are available: lower execution.workers,"
            " calibration.batch_size or calibration.samples"
        )


def check_states_room(recipe: Recipe, kept: int, needed: Footprint) -> None:
    """Enough disk for the 16-bit model's last hidden states, beside what quantizing takes of the
    store. kept: their bytes. Raises RoomError."""
    store = Store(recipe.execution.store)
    beside = needed.disk - (needed.statistics if recipe.execution.scratch else 0)
    what = f"last hidden states of the perplexity text ({shown_bytes(kept)}), layers and checkpoint"
    _check_disk("store", store, what, kept + beside)


def check_scoring_room(execution: ExecutionSection, needed: Room, worker: Worker) -> None:
    """Enough memory for the evaluation, here and on every worker's device. Raises RoomError."""
    if worker.memory is not None and needed.device > worker.memory:
        raise RoomError(
            f"execution.device: {worker.name}: evaluating takes {shown_bytes(needed.device)} of it"
            f" (a block, the output head), and {shown_bytes(worker.memory)} are there: choose"
            " devices with more memory, or cpu"
        )
    if execution.dask_address:
        return
    workers, available = workers_here(execution), available_memory()
    wanted = needed.together(workers)
    if wanted > available:
        raise RoomError(
            f"execution.workers: {workers}: evaluating takes {shown_bytes(needed.worker)} each,"
            f" {shown_bytes(wanted)} in all, and {shown_bytes(available)} are available: lower"
            " execution.workers"
        )


def _check_disk(field: str, store: Store, what: str, needed: int) -> None:
    free = _free(store.root)
    if needed > free and needed > free + sum(each.size for each in stored(store)):
        raise RoomError(
            f"execution.{field}: {store.root}: {what} take {shown_bytes(needed)}, and"
            f" {shown_bytes(free)} are free: name another folder, or make room (`dpq store gc`)"
        )


def _memory_here(execution: ExecutionSection, needed: Footprint) -> int:
    """Bytes beyond what this process has already."""
    workers = workers_here(execution)
    started = 0 if execution.runner == "threads" else psutil.Process().memory_info().rss
    return needed.together(workers) + workers * started


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
