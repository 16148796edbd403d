"""Quantize the layers that read one input: the task that is fanned out."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.checkpoint.native import save_layer
from dpq_core.digests import digest
from dpq_core.layer.quantize import quantize_or_keep
from dpq_core.layer.shared_input import SharedInput
from dpq_core.model.given import reader_of
from dpq_core.model.plan import PlannedLayer, weight_of
from dpq_core.model.reader import CheckpointReader
from dpq_core.model.streaming import load_config, sixteen_bit_type
from dpq_core.recipe import Recipe
from infra.store import ArtifactRef, Store
from tasks.calibrate import load_statistics
from tasks.support.model import Model
from tasks.support.stages import computed_by
from tasks.support.work import Made, Readers
from tasks.support.worker import Worker, this_worker


@lru_cache(maxsize=4)
def _source(folder: Path, model_digest: str, trusted: bool) -> tuple[CheckpointReader, torch.dtype]:
    """A checkpoint's reader, and the type that it runs in, kept: a mixture has thousands of layers,
    and the headers of all shards would be read for each. The digest says that it is still the same
    checkpoint."""
    return reader_of(folder), sixteen_bit_type(load_config(folder, trusted), folder)


class LayerError(RuntimeError):
    """A layer that could not be quantized, by name."""


@task(name="quantize", task_run_name="quantize {readers.title}", cache_policy=NO_CACHE)
def quantize(
    recipe: Recipe, model: Model, readers: Readers, statistics: ArtifactRef | None
) -> Made[dict[str, ArtifactRef]]:
    """The quantized layers by name, from their weights and the statistics of their input (None: of
    an embedding, see `Readers.given`). What is
    stored already is not made again: a run that was killed goes on at the layer.

    Raises:
        LayerError: no quantization within the scheme; nothing falls back to rounding.
    """
    store, worker = Store(recipe.execution.store), this_worker(recipe.execution)
    inputs: list[SharedInput] = []  # read for the first layer that is not there

    def shared_input() -> SharedInput | None:
        if statistics is None:
            return None
        if not inputs:
            inputs.append(SharedInput(load_statistics(statistics, store).to(worker.device)))
        return inputs[0]

    layers = {}
    with worker.watched() as device_peak:
        for layer in readers.layers:
            key = _key(recipe, model, layer, statistics, worker)
            make = _maker(recipe, model, layer, worker, shared_input)
            layers[layer.name], _ = store.get_or_make("layers", key, make)
        return Made(layers, device_peak())


def _key(
    recipe: Recipe,
    model: Model,
    layer: PlannedLayer,
    statistics: ArtifactRef | None,
    worker: Worker,
) -> str:
    correction, lost = recipe.calibration.correction, recipe.calibration.where_rounding_wins
    return digest(
        {
            **computed_by("layers", worker.arithmetic),
            "model": model.digest,
            "layer": layer.name,
            "statistics": statistics and statistics.sha256,
            "scheme": layer.scheme.model_dump(mode="json"),
            "min_tokens_per_input": recipe.calibration.min_tokens_per_input,
            **({"correction": correction} if correction else {}),
            **({"where_rounding_wins": lost} if lost != "name" else {}),
        }
    )


def _maker(
    recipe: Recipe,
    model: Model,
    layer: PlannedLayer,
    worker: Worker,
    shared_input: Callable[[], SharedInput | None],
) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        trusted = recipe.model.trust_remote_code
        reader, dtype = _source(model.folder, model.digest, trusted)
        weight = weight_of(reader, layer, dtype)
        try:
            quantized = quantize_or_keep(
                weight.to(worker.device),
                shared_input(),
                layer.scheme,
                recipe.calibration.min_tokens_per_input,
                recipe.calibration.correction,
                recipe.calibration.where_rounding_wins,
            )
        except ValueError as error:
            raise LayerError(f"{layer.name}: {error}") from error
        save_layer(folder, quantized.to("cpu"))

    return make
