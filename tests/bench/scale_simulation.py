"""Quantizing a large model on many GPUs, as events: who computes, reads and writes what, and when.

One GPU walks through the blocks (two forward passes, and Hessians); a block's layers go to whoever
is free once its statistics are stored, in the order in which `flows.quantize` submits. Bytes take
the shared disk's time, and that of SHA-256 on cores. A transfer has the disk for itself: where all
of them together take the disk longer, that is the answer. Rates are given (`Rates`): of disk and
SHA-256 as scale.py measures them, of a GPU by products measured elsewhere (docs/scale.md).
"""

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from scale_shapes import Shape


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second."""

    bf16: float = 400e12  # products with FP32 sums: forward, Hessians
    fp32: float = 40e12  # factorisation, column loop, gradient passes
    column: float = 2e-6  # s a column and pass: steps that wait for one another
    disk: float = 1e9  # shared by all
    written: float = 0.626e9  # a core's SHA-256, with the page cache
    read: float = 0.845e9


@dataclass(frozen=True)
class Layout:
    """Where things stay.

    together: the layers that read one input are one task, factorised once. blocks: that a
    calibration task passes before it stores hidden states. behind: writes go on while the next
    block computes. hashing: cores that hash an artifact. kept: on one machine, statistics stay in
    the memory of the process for its layers, and what was read of the checkpoint in the page cache.
    scratch: bytes a second of a disk of each machine that has statistics and hidden states; None:
    the shared one has.
    """

    name: str
    together: bool = False
    blocks: int = 1
    behind: bool = False
    hashing: int = 1
    kept: bool = False
    scratch: float | None = None


BEFORE = Layout("before")
AFTER = Layout("after", together=True, blocks=8, behind=True, hashing=8, kept=True)
LAYOUTS = (BEFORE, AFTER, replace(AFTER, name="after, with a scratch disk", scratch=5e9))


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
    """Seconds until the last layer is stored, and what they were bound by."""

    def __init__(
        self, shape: Shape, tokens: int, passes: int, gpus: int, layout: Layout, rates: Rates
    ) -> None:
        self.shape, self.tokens, self.passes, self.gpus = shape, tokens, passes, gpus
        self.layout, self.rates = layout, rates
        self.disk_busy = self.computing = 0.0  # s, of the disk and of all GPUs together

    def run(self) -> float:
        """A worker that is free takes the next calibration, or the layers that wait longest."""
        free = [(0.0, worker) for worker in range(self.gpus)]
        ready: deque[tuple[float, Work]] = deque()  # since when, layers
        block, calibrated, last = 0, 0.0, 0.0
        while block < self.shape.blocks or ready:
            now, worker = heapq.heappop(free)
            if block < self.shape.blocks and (calibrated <= now or not ready):
                blocks = range(block, min(block + self.layout.blocks, self.shape.blocks))
                ends = calibrated = self._calibrated(blocks, max(now, calibrated))
                ready.extend((ends, work) for _ in blocks for work in self._layers())
                block = blocks.stop
            else:
                since, work = ready.popleft()
                ends = self._done(work, max(now, since))
            last = max(last, ends)
            heapq.heappush(free, (ends, worker))
        return max(last, self.disk_busy)

    def _calibrated(self, blocks: range, begin: float) -> float:
        """When a task that passes these blocks has stored all that comes of them."""
        now, written = begin, begin
        for block in blocks:
            work = self._calibration(block, blocks)
            now = self._computed(work, now)
            written = self._written(work, max(now, written))
            now = now if self.layout.behind else written
        return max(now, written)

    def _done(self, work: Work, begin: float) -> float:
        return self._written(work, self._computed(work, begin))

    def _computed(self, work: Work, now: float) -> float:
        for kind, size in work.reads.items():
            now = self._moved(kind, size, now, self.rates.read)
        took = work.bf16 / self.rates.bf16 + work.fp32 / self.rates.fp32 + work.steps
        self.computing += took
        return now + took

    def _written(self, work: Work, now: float) -> float:
        for kind, size in work.writes.items():
            now = self._moved(kind, size, now, self.rates.written)
        return now

    def _moved(self, kind: str, size: float, now: float, hashing: float) -> float:
        """When bytes have gone through a disk, and through SHA-256 (tensors of a checkpoint are
        read without)."""
        hashes = 0.0 if kind == "checkpoint" else size / (hashing * self.layout.hashing)
        if self.layout.scratch and kind in ("Hessians", "hidden"):
            return now + max(size / self.layout.scratch, hashes)
        self.disk_busy += size / self.rates.disk
        return now + max(size / self.rates.disk, hashes)

    def _calibration(self, block: int, blocks: range) -> Work:
        inputs = self.shape.inputs()
        weights = sum(n * sum(rows) for n, rows in inputs)
        hidden = 2.0 * self.tokens * self.shape.hidden
        self.disk_busy += 2.0 * weights / self.rates.disk  # read ahead: nobody waits
        reads: dict[str, float] = {}
        if block == blocks.start:  # by two passes; from the second on out of memory
            reads["hidden"] = hidden if len(blocks) > 1 else 2 * hidden
        writes = {"Hessians": sum(4.0 * n**2 for n, _ in inputs)}
        if block == blocks[-1]:
            writes["hidden"] = hidden
        hessians = sum(2.0 * self.tokens * n**2 for n, _ in inputs)
        return Work(bf16=2 * 2.0 * self.tokens * weights + hessians, reads=reads, writes=writes)

    def _layers(self) -> list[Work]:
        """Tasks of a block, the most work first."""
        tasks, layout = [], self.layout
        in_memory = layout.kept and self.gpus <= ONE_MACHINE
        for n, rows in self.shape.inputs():
            for group in [rows] if layout.together else [[m] for m in rows]:
                weights = float(n) * sum(group)
                reads = {"checkpoint": 2 * weights, "Hessians": 4.0 * n**2}
                work = Work(
                    fp32=n**3 + (2 + 4 * self.passes) * weights * n,
                    steps=n * (1 + self.passes) * self.rates.column * len(group),
                    reads={} if in_memory else reads,
                    writes={"layers": 0.53 * weights},
                )
                tasks.append(work)
        return sorted(tasks, key=lambda work: -work.fp32)


def table(shapes: Iterable[Shape], tokens: int, passes: int, rates: Rates) -> Iterator[str]:
    """Minutes by model, layout and number of GPUs, in brackets the shared disk's share of them."""
    yield f"| minutes (disk at work) | {' | '.join(f'{n} GPU' for n in GPUS)} | arithmetic |"
    yield f"|---|{'---|' * len(GPUS)}---|"
    for shape in shapes:
        for layout in LAYOUTS:
            cells = []
            for gpus in GPUS:
                simulation = Simulation(shape, tokens, passes, gpus, layout, rates)
                seconds = simulation.run()
                cells.append(f"{seconds / 60:.1f} ({simulation.disk_busy / seconds:.0%})")
            yield (
                f"| {shape.name}, {layout.name} | {' | '.join(cells)} |"
                f" {simulation.computing / 60:.1f} |"
            )


GPUS, ONE_MACHINE = (1, 8, 64), 8
