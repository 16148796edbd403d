"""From checked inputs to a verified checkpoint: calibrate, fan the layers out, assemble, verify."""

import json
from collections import deque
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from dpq_core.checkpoint import MANIFEST
from dpq_core.device import share_machine
from dpq_core.leaves import shares
from dpq_core.recipe import Recipe
from flows.attended import attended
from infra.memory import watched
from infra.store import ArtifactRef
from tasks.assemble import assemble, verify
from tasks.calibrate import Share, calibrate, calibrate_share, is_calibrated, parts
from tasks.memory import MemoryUse
from tasks.preflight import Inputs, preflight
from tasks.progress import parts_of_step, stepper
from tasks.quantize import quantize as quantize_layer

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
        layers, statistics = quantize_layers(recipe, inputs)
    memory = MemoryUse.of(recipe, inputs.footprint, peaks)
    get_run_logger().info(memory.line)
    checkpoint = assemble(recipe, inputs.model, inputs.calibration, layers)
    integrity = verify(recipe, inputs.model, inputs.calibration, layers, checkpoint)
    manifest = json.loads((checkpoint.folder / MANIFEST).read_text("utf-8"))
    return Candidate(inputs, layers, statistics, checkpoint, manifest, integrity, memory)


def quantize_layers(
    recipe: Recipe, inputs: Inputs
) -> tuple[dict[str, ArtifactRef], dict[str, ArtifactRef]]:
    """All layers' artifacts, and all statistics. A block's layers are submitted as soon as it is
    calibrated, the larger first; with `propagation: quantized` the next block waits for them."""
    plan, model = inputs.plan, inputs.model
    futures: dict[str, PrefectFuture[ArtifactRef]] = {}
    waiting: deque[PrefectFuture[ArtifactRef]] = deque()
    statistics: dict[str, ArtifactRef] = {}
    waits = recipe.calibration.propagation == "quantized"
    step_block = stepper("calibrate", plan.blocks)
    for block in range(plan.blocks):
        done = [layer for layer in plan.layers if waits and layer.block < block]
        upstream = {layer.name: _result(layer.name, futures[layer.name]) for layer in done}
        _share_calibration(recipe, inputs, block, upstream)
        statistics |= calibrate(recipe, model, inputs.calibration, block, upstream)
        step_block()
        for layer in sorted(plan.of_block(block), key=lambda layer: -layer.weights):
            if len(waiting) == _AHEAD:
                waiting.popleft().wait()
            futures[layer.name] = quantize_layer.submit(
                recipe, model, layer, statistics[layer.statistics]
            )
            waiting.append(futures[layer.name])
    step_layer = stepper("quantize", len(futures))
    layers: dict[str, ArtifactRef] = {}
    for layer in plan.layers:
        layers[layer.name] = _result(layer.name, futures[layer.name])
        step_layer()
    return layers, statistics


def _share_calibration(
    recipe: Recipe, inputs: Inputs, block: int, upstream: dict[str, ArtifactRef]
) -> None:
    """What `calibrate` adds up of a block, by tasks that run side by side."""
    model, windows, shards = inputs.model, inputs.calibration, recipe.execution.shards
    if shards == 1 or is_calibrated(recipe, model, windows, block, upstream):
        return
    ranges = shares(inputs.leaves, shards)
    step = parts_of_step("calibrate", block, len(parts(recipe)) * shards)
    for part in parts(recipe):
        each = [Share(block, part, *leaves, inputs.footprint.share) for leaves in ranges]
        made = [calibrate_share.submit(recipe, model, windows, upstream, share) for share in each]
        for share, future in zip(each, made, strict=True):
            _result(f"block {block}, leaves {share.first} to {share.last - 1}", future)
            step()


_AHEAD = 512  # layers submitted and not waited for, beyond which calibration waits for the oldest


def _result(name: str, future: PrefectFuture[_Result]) -> _Result:
    """What came of a layer, or of a share of a block's calibration.

    Raises:
        WorkerLostError: its worker did not live to make it.
    """
    try:
        return future.result()
    except Exception as error:
        if isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker":
            raise WorkerLostError(
                f"{name}: the worker that had it was killed, for lack of memory perhaps: "
                "lower execution.workers, and run again: what is finished is kept"
            ) from error
        raise
