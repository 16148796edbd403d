"""Quantize one layer: the task that is fanned out."""

from functools import lru_cache
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.checkpoint import save_layer
from dpq_core.device import resolve_device
from dpq_core.digests import code_digest, digest
from dpq_core.plan import PlannedLayer
from dpq_core.quantize import quantize_or_keep
from dpq_core.reader import CheckpointReader
from dpq_core.recipe import Recipe
from infra.store import ArtifactRef, Store
from tasks.calibrate import load_statistics
from tasks.model import Model


@lru_cache(maxsize=4)
def _reader(folder: Path, model_digest: str) -> CheckpointReader:
    """A checkpoint's reader, kept: a mixture has thousands of layers, and the headers of all shards
    would be read for each. The digest says that it is still the same checkpoint."""
    return CheckpointReader(folder)


class LayerError(RuntimeError):
    """A layer that could not be quantized, by name."""


@task(name="quantize", task_run_name="quantize {layer.name}", cache_policy=NO_CACHE)
def quantize(
    recipe: Recipe, model: Model, layer: PlannedLayer, statistics: ArtifactRef
) -> ArtifactRef:
    """The quantized layer as an artifact, from its weight and the statistics of its input.

    Raises:
        LayerError: no quantization within the scheme; nothing falls back to rounding.
    """
    store = Store(recipe.execution.store)
    device = resolve_device(recipe.execution.device)
    key = digest(
        {
            "code": code_digest("dpq_core.quantize"),
            "model": model.digest,
            "layer": layer.name,
            "statistics": statistics.sha256,
            "scheme": layer.scheme.model_dump(mode="json"),
            "min_tokens_per_input": recipe.calibration.min_tokens_per_input,
            "device": device.type,
        }
    )

    def make(folder: Path) -> None:
        weight = _reader(model.folder, model.digest).tensor(f"{layer.name}.weight")
        try:
            quantized = quantize_or_keep(
                weight.to(device),
                load_statistics(statistics, store).to(device),
                layer.scheme,
                recipe.calibration.min_tokens_per_input,
            )
        except ValueError as error:
            raise LayerError(f"{layer.name}: {error}") from error
        save_layer(folder, quantized.to("cpu"))

    return store.get_or_make("layers", key, make)[0]
