"""Memory and disk: whether there is enough before a run, and what was used beside what was said."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from dpq_core.device import resolve_device
from dpq_core.errors import InputError
from dpq_core.footprint import Footprint
from dpq_core.recipe import ExecutionSection, Recipe
from infra.disk import shown_bytes
from infra.memory import Peaks, available_memory
from infra.store import Store
from infra.store_care import stored


class RoomError(InputError):
    """Too little memory or disk for what a recipe asks."""


@dataclass(frozen=True)
class MemoryUse:
    """Peaks of quantizing in bytes, as predicted and as used; of a worker process: 0 where layers
    are quantized in threads of the process itself, and the use None where they are elsewhere."""

    predicted: int
    used: int
    worker_predicted: int = 0
    worker_used: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, needed: Footprint, peaks: Peaks) -> "MemoryUse":
        execution = recipe.execution
        if execution.runner == "threads":
            workers = execution.workers * needed.worker
            return cls(peaks.start + needed.block + workers, peaks.process)
        return cls(
            predicted=peaks.start + needed.block,
            used=peaks.process,
            worker_predicted=peaks.start + needed.worker,
            worker_used=peaks.worker or None,
        )

    @property
    def line(self) -> str:
        """For people."""
        text = f"memory: {shown_bytes(self.used)} of {shown_bytes(self.predicted)} predicted"
        if self.worker_predicted:
            used = "unknown" if self.worker_used is None else shown_bytes(self.worker_used)
            text += f"; a worker {used} of {shown_bytes(self.worker_predicted)}"
        return text

    def as_metrics(self) -> dict[str, float]:
        """For MLflow: megabytes, what is known."""
        found = {
            "memory.predicted_mb": self.predicted,
            "memory.used_mb": self.used,
            "memory.worker_predicted_mb": self.worker_predicted,
            "memory.worker_used_mb": self.worker_used,
        }
        return {name: value / 1e6 for name, value in found.items() if value}


def check_room(recipe: Recipe, needed: Footprint, store: Store) -> None:
    """Enough disk for the store, and enough memory here for what runs here.

    What a device or another machine has is not known here. What the store has already is not needed
    again, perhaps: it counts as room.

    Raises:
        RoomError: naming what is needed, what there is, and the way out.
    """
    execution = recipe.execution
    free = _free(store.root)
    if needed.disk > free and needed.disk > free + sum(each.size for each in stored(store)):
        raise RoomError(
            f"execution.store: {store.root}: calibration statistics, layers and the checkpoint take"
            f" {shown_bytes(needed.disk)}, and {shown_bytes(free)} are free: name another folder,"
            " or make room (`dpq store gc`)"
        )
    if resolve_device(execution.device).type != "cpu" or execution.dask_address:
        return
    wanted, available = _memory_here(execution, needed), available_memory()
    if wanted > available:
        raise RoomError(
            f"execution.workers: {execution.workers}: a layer takes {shown_bytes(needed.layer)},"
            f" calibration of a block {shown_bytes(max(needed.block, needed.share))},"
            f" {shown_bytes(wanted)} in all,"
            f" and {shown_bytes(available)} are available: lower execution.workers,"
            " calibration.batch_size or calibration.samples"
        )


def _memory_here(execution: ExecutionSection, needed: Footprint) -> int:
    """Bytes beyond what this process has already."""
    started = 0 if execution.runner == "threads" else psutil.Process().memory_info().rss
    return needed.block + execution.workers * (needed.worker + started)


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
