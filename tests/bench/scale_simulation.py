"""Quantizing a large model on many GPUs, as events: who computes, reads and writes what, and when.

One GPU walks through the blocks (two forward passes, and Hessians); a block's layers go to whoever
is free, the larger first, once its statistics are there. A transfer takes its turn at the shared
disk, and its SHA-256 takes a core. What is simulated is the order that `flows.quantize` submits in;
rates are given (`Rates`), those of a GPU by the measured products that docs/scale.md names.
"""

import heapq
from dataclasses import dataclass, field

GB = 1e9


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second."""

    bf16: float = 400e12  # products with FP32 sums: forward, Hessians
    fp32: float = 40e12  # factorisation, column loop, gradient passes
    column: float = 2e-6  # s a column and pass: steps that wait for one another
    disk: float = 1 * GB  # shared by all
    written: float = 0.626 * GB  # a core's SHA-256, with the page cache
    read: float = 0.845 * GB


@dataclass(frozen=True)
class Layout:
    """Where things stay. before: layers one by one, everything through the store.

    together: the layers that read one input are one task, factorised once. blocks: that a
    calibration task passes before it stores hidden states. behind: writes go on while the next
    block computes. scratch: statistics on a disk of each machine (bytes a second), not the shared
    one; None: shared. kept: a block's statistics stay in the process that made them, for its
    layers. cached: what a machine read of the checkpoint stays in its memory.
    """

    name: str
    together: bool = False
    blocks: int = 1
    behind: bool = False
    scratch: float | None = None
    kept: bool = False
    cached: bool = False


BEFORE = Layout("before")
AFTER = Layout("after", together=True, blocks=8, behind=True, kept=True, cached=True)
SCRATCH = Layout(
    "scratch", together=True, blocks=8, behind=True, scratch=5 * GB, kept=True, cached=True
)


@dataclass(frozen=True)
class Work:
    """Of a task: operations in both arithmetics, s that steps take one after the other, and bytes
    read and written by kind."""

    bf16: float = 0.0
    fp32: float = 0.0
    steps: float = 0.0
    reads: dict[str, float] = field(default_factory=dict)
    writes: dict[str, float] = field(default_factory=dict)


class Simulation:
    """Seconds until the last layer is stored. `shape` is a row of scale.py's SHAPES."""

    def __init__(
        self, shape: object, tokens: int, passes: int, gpus: int, layout: Layout, rates: Rates
    ) -> None:
        self.shape, self.tokens, self.passes, self.gpus = shape, tokens, passes, gpus
        self.layout, self.rates = layout, rates
        self._disk_free = 0.0  # when the shared disk has done what it was asked
        self.disk_busy = self.busy = 0.0

    def run(self) -> float:
        """Events: a worker is free at some time, and takes calibration or the largest layer."""
        free = [(0.0, worker) for worker in range(self.gpus)]
        ready: list[tuple[float, int, Work]] = []  # when, order, layers
        block, calibrated, last, number = 0, 0.0, 0.0, 0
        while block < self.shape.blocks or ready:
            now, worker = heapq.heappop(free)
            if block < self.shape.blocks and (calibrated <= now or not ready):
                begin = max(now, calibrated)
                ends = calibrated = self._done(self._calibration(block), begin, behind=True)
                for work in self._layers():
                    number += 1
                    heapq.heappush(ready, (ends, number, work))
                block += 1
            else:
                at, _, work = heapq.heappop(ready)
                ends = self._done(work, max(now, at), behind=False)
            last = max(last, ends, self._disk_free)
            heapq.heappush(free, (ends, worker))
        return last

    def _done(self, work: Work, begin: float, behind: bool) -> float:
        """When a task that begins then is at its end. What it reads, it waits for."""
        rates, now = self.rates, begin
        for kind, size in work.reads.items():
            now = self._moved(kind, size, now, rates.read)
        took = work.bf16 / rates.bf16 + work.fp32 / rates.fp32 + work.steps
        self.busy += took
        now += took
        for kind, size in work.writes.items():
            end = self._moved(kind, size, now, rates.written)
            now = now if self.layout.behind and behind else end
        return now

    def _moved(self, kind: str, size: float, now: float, hashing: float) -> float:
        """When bytes have gone through a disk, and their SHA-256 is known (not of checkpoints)."""
        hashed = 0.0 if kind == "checkpoint" else size / hashing
        if kind in ("Hessians", "hidden") and self.layout.scratch:
            return now + max(size / self.layout.scratch, hashed)
        if kind == "memory":
            return now
        self._disk_free = max(self._disk_free, now) + size / self.rates.disk
        self.disk_busy += size / self.rates.disk
        return max(self._disk_free, now + hashed)

    def _calibration(self, block: int) -> Work:
        shape, inputs = self.shape, self.shape.inputs()
        weights = sum(n * sum(rows) for n, rows in inputs)
        hidden = 2.0 * self.tokens * shape.hidden
        stored = block % self.layout.blocks == 0
        return Work(
            bf16=2 * 2.0 * self.tokens * weights + sum(2.0 * self.tokens * n**2 for n, _ in inputs),
            reads={"checkpoint": 2.0 * weights}
            | ({"hidden": (1 if self.layout.blocks > 1 else 2) * hidden} if stored else {}),
            writes={"Hessians": sum(4.0 * n**2 for n, _ in inputs)}
            | ({"hidden": hidden} if (block + 1) % self.layout.blocks == 0 else {}),
        )

    def _layers(self) -> list[Work]:
        """Tasks of a block, the larger first."""
        tasks, layout = [], self.layout
        one_process = self.gpus <= 8  # threads of one machine
        for n, rows in self.shape.inputs():
            for group in [rows] if layout.together else [[m] for m in rows]:
                weights = float(n) * sum(group)
                hessian = "memory" if layout.kept and one_process else "Hessians"
                source = "memory" if layout.cached and one_process else "checkpoint"
                tasks.append(
                    Work(
                        fp32=n**3 + (2 + 4 * self.passes) * weights * n,
                        steps=n * (1 + self.passes) * self.rates.column * len(group),
                        reads={hessian: 4.0 * n**2, source + "": 2 * weights}
                        if hessian != source
                        else {hessian: 0.0},
                        writes={"layers": 0.53 * weights},
                    )
                )
        return sorted(tasks, key=lambda work: -work.fp32)
