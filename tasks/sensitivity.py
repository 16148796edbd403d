"""What each choice for each layer of a block costs, one task a block."""

import json
from collections.abc import Callable
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.checkpoint import load_layer
from dpq_core.device import resolve_device
from dpq_core.digests import code_digest, digest
from dpq_core.quantize import QuantizedLinear
from dpq_core.recipe import Recipe
from dpq_core.sensitivity import Variant, block_losses
from dpq_core.streaming import StreamedModel
from infra.store import ArtifactRef, Store
from tasks.model import Model
from tasks.progress import stepper
from tasks.windows import load as load_windows

_FILE = "losses.json"

Variants = dict[str, dict[str, ArtifactRef]]  # layer → choice → the layer quantized so
Losses = dict[str, dict[str, float]]  # layer → choice → nats a token


@task(name="sensitivity", task_run_name="sensitivity of block {block}", cache_policy=NO_CACHE)
def sensitivity(
    recipe: Recipe, model: Model, windows: ArtifactRef, block: int, variants: Variants
) -> Losses:
    """Losses of a block's layers, on the first calibration windows."""
    store = Store(recipe.execution.store)
    device = resolve_device(recipe.execution.device)
    samples, batch_size = recipe.repair.samples, recipe.calibration.batch_size
    key = digest(
        {
            "code": code_digest("dpq_core.sensitivity"),
            "model": model.digest,
            "windows": windows.sha256,
            "samples": samples,
            "batch_size": batch_size,
            "device": device.type,
            "variants": {
                name: {choice: artifact.sha256 for choice, artifact in choices.items()}
                for name, choices in variants.items()
            },
        }
    )

    def make(folder: Path) -> None:
        stream = StreamedModel(model.folder, device)
        hidden = stream.embed(load_windows(windows, store)[:samples], batch_size)
        for earlier in range(block):
            with stream.block(earlier):
                stream.advance(hidden, batch_size)
        layers = {
            Variant(name, choice): _loader(store, artifact)
            for name, choices in variants.items()
            for choice, artifact in choices.items()
        }
        step = stepper(f"sensitivity of block {block}", stream.block_count - block + 1)
        losses = block_losses(stream, block, hidden, layers, batch_size, step)
        content: Losses = {}
        for variant, loss in losses.items():
            content.setdefault(variant.name, {})[variant.choice] = loss
        (folder / _FILE).write_text(json.dumps(content))

    artifact, _ = store.get_or_make("sensitivity", key, make)
    found: Losses = json.loads((store.open(artifact) / _FILE).read_text())
    return found


def _loader(store: Store, artifact: ArtifactRef) -> Callable[[], QuantizedLinear]:
    """Reads a layer when it is its turn."""
    return lambda: load_layer(store.open(artifact))
