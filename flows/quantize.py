"""From checked inputs to a verified checkpoint: calibrate, fan the layers out, assemble, verify."""

import json
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeVar

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from dpq_core.calibration.reduction_tree import shares
from dpq_core.checkpoint.native import MANIFEST
from dpq_core.layer.unseen import UnseenSummary
from dpq_core.machine.device import share_machine
from dpq_core.model.plan import PlannedLayer
from dpq_core.recipe import Recipe
from flows.running.liveness import attended
from infra.memory import watched
from infra.store import ArtifactRef
from tasks.assemble import assemble, cache_of, verify
from tasks.calibrate import calibrate, calibrate_share, is_calibrated, parts
from tasks.preflight import Inputs, preflight
from tasks.quantize import quantize as quantize_readers
from tasks.support import kept_statistics
from tasks.support.memory import MemoryUse
from tasks.support.progress import parts_of_step, stepper
from tasks.support.work import Made, Passes, Readers, Share, readers_of

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Candidate:
    """A verified (or refuted: see `integrity`) checkpoint, its manifest, and what it was made of:
    layers by name, statistics by the shared input's name."""

    inputs: Inputs
    layers: dict[str, ArtifactRef]
    statistics: dict[str, ArtifactRef]
    checkpoint: ArtifactRef
    manifest: dict[str, Any]
    integrity: dict[str, str | None]
    memory: MemoryUse


class WorkerLostError(RuntimeError):
    """A process that was killed from outside while it worked for us."""


class IntegrityError(RuntimeError):
    """A checkpoint that does not say what the quantized layers say."""


@flow(name="quantize")
@attended
def quantize(recipe: Recipe) -> Candidate:
    """Checkpoint in, verified W4A8 checkpoint out.

    Raises:
        IntegrityError: the written checkpoint did not pass its verification.
    """
    share_machine(recipe.execution.threads_per_worker)
    candidate = make_candidate(recipe, preflight(recipe))
    wrong = [f"{name}: {detail}" for name, detail in candidate.integrity.items() if detail]
    if wrong:
        raise IntegrityError(f"{candidate.checkpoint.folder}: {'; '.join(wrong)}")
    return candidate


def make_candidate(recipe: Recipe, inputs: Inputs) -> Candidate:
    """The tasks of quantization; to be called inside a flow with `task_runner(…)`."""
    with watched() as peaks:
        made = quantize_layers(recipe, inputs)
    layers, statistics = made.layers, made.statistics
    memory = MemoryUse.of(recipe, inputs.footprint, peaks, made.device_peak)
    get_run_logger().info(memory.line)
    cache = cache_of(recipe, inputs.model, statistics)
    about = recipe, inputs.model, inputs.calibration, layers
    checkpoint = assemble(*about, cache)
    integrity = verify.submit(*about, checkpoint, cache).result()
    manifest = json.loads((checkpoint.folder / MANIFEST).read_text("utf-8"))
    if found := UnseenSummary.of(manifest["layers"]):
        get_run_logger().info(found.line)
        for line in found.warnings:
            get_run_logger().warning(line)
    return Candidate(inputs, layers, statistics, checkpoint, manifest, integrity, memory)


@dataclass
class QuantizedLayers:
    """All layers' artifacts by name, all statistics by input; the most bytes that any worker had of
    its device, None where nobody knows."""

    layers: dict[str, ArtifactRef] = field(default_factory=dict)
    statistics: dict[str, ArtifactRef] = field(default_factory=dict)
    device_peak: int | None = None

    def saw(self, device_peak: int | None) -> None:
        self.device_peak = max(self.device_peak or 0, device_peak or 0) or None


def quantize_layers(recipe: Recipe, inputs: Inputs) -> QuantizedLayers:
    """Calibrate blocks and quantize their layers: a block's as soon as it is calibrated, the larger
    first; with `propagation: quantized` the next block waits for them, with `groups` the next
    layers of the same block do."""
    try:
        return _FanOut(recipe, inputs).run()
    finally:
        kept_statistics.forget()


class _FanOut:
    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        self._recipe, self._inputs, self._plan = recipe, inputs, inputs.plan
        self._made = QuantizedLayers()
        self._waiting: dict[Readers, PrefectFuture[Made[dict[str, ArtifactRef]]]] = {}
        self._runs = turns(recipe, inputs)
        self._step_block = stepper("calibrate", sum(each.last - each.first for each in self._runs))
        self._step_layer = stepper("quantize", len(self._plan.layers))

    def run(self) -> QuantizedLayers:
        waits = self._recipe.calibration.propagation != "original"
        ahead = not waits and self._inputs.footprint.shards == 1
        runs = self._runs
        self._submit(self._plan.of_block(-1))  # the embedding, which waits for nothing
        calibrated = self._calibrate(runs[0])
        for passes, following in zip_longest(runs, runs[1:]):
            got = _result(passes.title, calibrated)
            self._made.saw(got.device_peak)
            self._made.statistics |= got.made
            if following and ahead:  # before this one's layers, which nothing waits for
                calibrated = self._calibrate(following)
            self._submit_layers(passes)
            if waits:
                self._collect(leave=0)
            if following and not ahead:
                calibrated = self._calibrate(following)
        self._collect(leave=0)
        self._made.layers = {each.name: self._made.layers[each.name] for each in self._plan.layers}
        return self._made

    def _calibrate(self, passes: Passes) -> PrefectFuture[Made[dict[str, ArtifactRef]]]:
        recipe, model, windows = self._recipe, self._inputs.model, self._inputs.calibration
        upstream, made = dict[str, ArtifactRef](), self._made.layers
        if recipe.calibration.propagation != "original":  # all that there are: they are waited for
            names = [layer.name for layer in self._plan.layers]
            upstream = {name: made[name] for name in names if name in made}
        if self._inputs.footprint.shards > 1:
            self._share(passes, upstream)
        return calibrate.submit(recipe, model, windows, upstream, passes)

    def _share(self, passes: Passes, upstream: dict[str, ArtifactRef]) -> None:
        """What `calibrate` adds up of a block, by tasks that run side by side."""
        about = self._recipe, self._inputs.model, self._inputs.calibration, upstream
        block, inputs = passes.first, passes.inputs
        if is_calibrated.submit(*about, block, inputs).result():
            return
        shards = min(self._inputs.footprint.shards, self._inputs.leaves)  # texts may be short
        ranges = shares(self._inputs.leaves, shards)
        step = parts_of_step("calibrate", passes.place, len(parts(self._recipe)) * shards)
        takes = self._inputs.footprint.share
        for part in parts(self._recipe):
            each = [Share(block, part, *leaves, takes, inputs) for leaves in ranges]
            made = [calibrate_share.submit(*about, share) for share in each]
            for share, future in zip(each, made, strict=True):
                name = f"block {block}, leaves {share.first} to {share.last - 1}"
                self._made.saw(_result(name, future))
                step()

    def _submit_layers(self, passes: Passes) -> None:
        for block in range(passes.first, passes.last):
            self._step_block()
            self._submit(self._plan.of_block(block, passes.inputs))

    def _submit(self, layers: list[PlannedLayer]) -> None:
        for readers in readers_of(layers, self._recipe.calibration.correction > 0):
            self._collect(leave=_AHEAD)
            statistics = readers.given(self._made.statistics)
            self._waiting[readers] = quantize_readers.submit(
                self._recipe, self._inputs.model, readers, statistics
            )

    def _collect(self, leave: int) -> None:
        """What came of the tasks that wait longest, until so many are left."""
        while len(self._waiting) > leave:
            readers = next(iter(self._waiting))
            got = _result(readers.title, self._waiting.pop(readers))
            self._made.saw(got.device_peak)
            self._made.layers |= got.made
            for _ in readers.layers:
                self._step_layer()


_AHEAD = 256  # tasks submitted and not waited for, beyond which calibration waits for the oldest


def turns(recipe: Recipe, inputs: Inputs) -> list[Passes]:
    """What calibration tasks do one after the other: runs of blocks, or some inputs of a block."""
    plan, needed, fed = inputs.plan, inputs.footprint, recipe.calibration.propagation
    every, shared = needed.blocks_per_task, needed.shards > 1
    if fed == "groups":
        steps = [(n, names) for n in range(plan.blocks) for names in plan.inputs_by_step(n)]
        return [
            Passes(n, n + 1, 1, needed.block, shared, names, place, place + 1 == len(steps))
            for place, (n, names) in enumerate(steps)
        ]
    runs = [(first, min(first + every, plan.blocks)) for first in range(0, plan.blocks, every)]
    return [
        Passes(
            *run, every, needed.block, shared, None, run[0], fed == "original" or run is runs[-1]
        )
        for run in runs
    ]


def worker_lost(error: Exception) -> bool:
    """Whether a runner says so: that its worker was killed."""
    return isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker"


def _result(name: str, future: PrefectFuture[_Result]) -> _Result:
    """What came of layers, or of blocks' calibration, or of a share of it.

    Raises:
        WorkerLostError: its worker did not live to make it.
    """
    try:
        return future.result()
    except Exception as error:
        if worker_lost(error):
            raise WorkerLostError(
                f"{name}: the worker that had it was killed, for lack of memory perhaps: "
                "lower execution.workers, and run again: what is finished is kept"
            ) from error
        raise
