"""What each choice for each layer of a block costs, one task a block."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.checkpoint.native import load_layer, load_report
from dpq_core.digests import digest
from dpq_core.layer.records import QuantizedLinear
from dpq_core.recipe import Recipe
from dpq_core.repair.sensitivity import Trial, block_losses, outside_losses
from infra.store import ArtifactRef, Store
from tasks.support.model import Model, stream_of
from tasks.support.stages import computed_by
from tasks.support.tokenized_data import load_inputs
from tasks.support.worker import this_worker

_FILE = "losses.json"

Trials = dict[str, dict[str, ArtifactRef]]  # layer → choice → the layer quantized so


@dataclass(frozen=True)
class Cost:
    """What one choice for one layer costs. loss: nats a token. error: the layer objective,
    relative."""

    loss: float
    error: float


Costs = dict[str, dict[str, Cost]]  # layer → choice → what it costs


@task(name="sensitivity", task_run_name="sensitivity of block {block}", cache_policy=NO_CACHE)
def sensitivity(
    recipe: Recipe, model: Model, windows: ArtifactRef, block: int, trials: Trials
) -> Costs:
    """Costs of a block's layers, or the embedding's, or the head's, on the first calibration
    windows, in FP32: in 16 bits the least change of a layer turns roundings after it, and costs
    more than eight bits do. block: as a plan has it."""
    store = Store(recipe.execution.store)
    worker = this_worker(recipe.execution)
    samples, batch_size = recipe.repair.samples, recipe.calibration.batch_size
    key = digest(
        {
            **computed_by("sensitivity", worker.arithmetic),
            "model": model.digest,
            "windows": windows.sha256,
            "samples": samples,
            "batch_size": batch_size,
            "variants": {
                name: {choice: artifact.sha256 for choice, artifact in choices.items()}
                for name, choices in trials.items()
            },
        }
    )

    def make(folder: Path) -> None:
        stream = stream_of(recipe, model, worker.device, torch.float32)
        inputs = load_inputs(windows, store, batch_size, samples)
        layers = {
            Trial(name, choice): _loader(store, artifact)
            for name, choices in trials.items()
            for choice, artifact in choices.items()
        }
        if block in range(stream.block_count):
            batches = stream.begin(inputs)
            for earlier in range(block):
                with stream.block(earlier):
                    stream.advance(batches)
            losses = block_losses(stream, block, batches, layers)
        else:
            losses = outside_losses(stream, inputs, layers)
        content: dict[str, dict[str, dict[str, float]]] = {}
        for trial, loss in losses.items():
            report = load_report(store.open(trials[trial.name][trial.choice]))
            cost = Cost(loss, report.error)
            content.setdefault(trial.name, {})[trial.choice] = asdict(cost)
        (folder / _FILE).write_text(json.dumps(content))

    artifact, _ = store.get_or_make("sensitivity", key, make)
    content = json.loads((store.open(artifact) / _FILE).read_text())
    return {
        name: {choice: Cost(**cost) for choice, cost in choices.items()}
        for name, choices in content.items()
    }


def _loader(store: Store, artifact: ArtifactRef) -> Callable[[], QuantizedLinear]:
    """Reads a layer when it is its turn."""
    return lambda: load_layer(store.open(artifact))
