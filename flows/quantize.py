"""From checked inputs to a verified checkpoint: calibrate, fan the layers out, assemble, verify."""

import json
from dataclasses import dataclass
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture

from dpq_core.checkpoint import MANIFEST
from dpq_core.device import share_machine
from dpq_core.recipe import Recipe
from flows.attended import attended
from infra.store import ArtifactRef
from tasks.assemble import assemble, verify
from tasks.calibrate import calibrate
from tasks.preflight import Inputs, preflight
from tasks.progress import stepper
from tasks.quantize import quantize as quantize_layer


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
    layers, statistics = _quantize_layers(recipe, inputs)
    checkpoint = assemble(recipe, inputs.model, inputs.calibration, layers)
    integrity = verify(recipe, inputs.model, inputs.calibration, layers, checkpoint)
    manifest = json.loads((checkpoint.folder / MANIFEST).read_text("utf-8"))
    return Candidate(inputs, layers, statistics, checkpoint, manifest, integrity)


def _quantize_layers(
    recipe: Recipe, inputs: Inputs
) -> tuple[dict[str, ArtifactRef], dict[str, ArtifactRef]]:
    """All layers' artifacts, and all statistics. A block's layers are submitted as soon as it is
    calibrated; with `propagation: quantized` the next block waits for them."""
    plan, model = inputs.plan, inputs.model
    futures: dict[str, PrefectFuture[ArtifactRef]] = {}
    statistics: dict[str, ArtifactRef] = {}
    waits = recipe.calibration.propagation == "quantized"
    step_block = stepper("calibrate", plan.blocks)
    for block in range(plan.blocks):
        upstream = {name: future.result() for name, future in futures.items()} if waits else {}
        statistics |= calibrate(recipe, model, inputs.calibration, block, upstream)
        step_block()
        for layer in plan.of_block(block):
            futures[layer.name] = quantize_layer.submit(
                recipe, model, layer, statistics[layer.statistics]
            )
    step_layer = stepper("quantize", len(futures))
    layers: dict[str, ArtifactRef] = {}
    for name, future in futures.items():
        layers[name] = future.result()
        step_layer()
    return layers, statistics
