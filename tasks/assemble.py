"""Put the quantized layers and the rest of the model into one native checkpoint, and verify it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from torch import Tensor
from torch.nn.functional import kl_div

from dpq_core.checkpoint.exports.card import licence_of
from dpq_core.checkpoint.native import QuantizedCheckpoint, load_layer
from dpq_core.checkpoint.writing import write_checkpoint
from dpq_core.digests import digest
from dpq_core.layer.kv_cache import CacheMaxima
from dpq_core.layer.records import QuantizedLinear
from dpq_core.model.inputs import ModelInputs
from dpq_core.model.kv_cache import cached_attentions, round_cache_of
from dpq_core.model.plan import plan_layers
from dpq_core.model.quantization import described, quantization_of
from dpq_core.model.streaming import StreamedModel
from dpq_core.paths import is_folder
from dpq_core.recipe import Recipe
from dpq_core.recipe.datasets import MixedDataset
from dpq_core.serving.runtimes import VERSION as RUNTIMES_VERSION
from dpq_core.serving.runtimes import runtime_for
from infra.store import ArtifactRef, Store
from tasks.calibrate import load_maxima
from tasks.support.model import Model, stream_of
from tasks.support.progress import stepper
from tasks.support.stages import computed_by
from tasks.support.tokenized_data import count_tokens, load_inputs, opening_of, scale_tokens
from tasks.support.worker import this_worker

_PROBE_WINDOWS = 2
_PROBE_LENGTH = 64
SERVED_DIVERGENCE = 0.002  # nats a token, as `attest.divergence` of other engines by default


def provenance(recipe: Recipe, model: Model, windows: ArtifactRef) -> dict[str, Any]:
    """What a checkpoint's manifest says of where it comes from. stored_as: of FP8, its method."""
    quantization, store = quantization_of(model.folder), Store(recipe.execution.store)
    for_scales = scale_tokens(windows, store)
    stored_as = {"stored_as": described(quantization)} if quantization else {}
    return {
        "base_model": stored_as
        | {
            "id": Path(model.id).name if is_folder(model.id) else model.id,
            "revision": model.revision,
            "digest": model.digest,
            "licence": licence_of(model.folder),
            "trust_remote_code": recipe.model.trust_remote_code,
        },
        "calibration": recipe.calibration.model_dump(
            mode="json",
            exclude={
                "dataset": True,
                "mixed_in": {"__all__": set(MixedDataset.model_fields) - {"share"}},
                "activations": {"dataset"},
            },
        )
        | ({} if for_scales is None else {"scale_tokens": for_scales})
        | {
            "windows": windows.sha256,
            "tokens": count_tokens(windows, store),
            "tokens_asked": recipe.calibration.samples * recipe.calibration.sequence_length,
            "opening": opening_of(windows, store),
        },
    }


def cache_of(
    recipe: Recipe, model: Model, statistics: dict[str, ArtifactRef]
) -> dict[str, ArtifactRef]:
    """The statistics, by the shared input's name, that have the largest keys and values, by
    attention; none where these are kept in 16 bits."""
    if recipe.scheme.kv_cache == "none":
        return {}
    made = cached_attentions(stream_of(recipe, model))
    return {name: statistics[beside] for name, beside in made.items()}


@task(name="assemble", cache_policy=NO_CACHE)
def assemble(
    recipe: Recipe,
    model: Model,
    windows: ArtifactRef,
    layers: dict[str, ArtifactRef],
    cache: dict[str, ArtifactRef] | None = None,
) -> ArtifactRef:
    """The native checkpoint: an artifact whose folder `load_quantized` reads. cache: of
    `cache_of`."""
    store = Store(recipe.execution.store)
    about = provenance(recipe, model, windows)
    key = digest(
        {
            **computed_by("checkpoints"),
            "layers": {name: artifact.sha256 for name, artifact in layers.items()},
            "scheme": recipe.scheme.model_dump(mode="json"),
            "about": about,
            **({"cache": {n: each.sha256 for n, each in cache.items()}} if cache else {}),
        }
    )

    def make(folder: Path) -> None:
        stream = stream_of(recipe, model)
        plan = plan_layers(stream, recipe.scheme, recipe.layers)
        step = stepper("assemble", len(plan.layers))

        def layer(name: str) -> QuantizedLinear:
            step()
            return load_layer(store.open(layers[name]))

        reader, scheme = stream.reader, recipe.scheme
        own = stream.wide, _maxima(cache, store)
        write_checkpoint(folder, reader, stream.dtype, plan, scheme, layer, about, *own)

    return store.get_or_make("checkpoints", key, make)[0]


def _maxima(cache: dict[str, ArtifactRef] | None, store: Store) -> dict[str, CacheMaxima]:
    return {name: load_maxima(artifact, store) for name, artifact in (cache or {}).items()}


@task(name="verify", cache_policy=NO_CACHE)
def verify(
    recipe: Recipe,
    model: Model,
    windows: ArtifactRef,
    layers: dict[str, ArtifactRef],
    checkpoint: ArtifactRef,
    cache: dict[str, ArtifactRef] | None = None,
) -> dict[str, str | None]:
    """Integrity of a checkpoint: check name → None where it passed, else what is wrong.

    Every file, tensor, shape and value is checked, and the checkpoint must give, to the last bit,
    the logits of the model that was put together from the layers' own artifacts. Where the
    candidate is scored as it is served, the runtime's predictions must be near to the formula's.
    """
    store, served = Store(recipe.execution.store), recipe.evaluation.served
    made_by = computed_by("integrity", this_worker(recipe.execution).arithmetic)
    about = {**made_by, "checkpoint": checkpoint.sha256} | (
        {"served": RUNTIMES_VERSION} if served else {}
    )
    key = digest(about)

    def make(folder: Path) -> None:
        maxima = _maxima(cache, store)
        checks = _check(recipe, model, windows, layers, store.open(checkpoint), store, maxima)
        (folder / "integrity.json").write_text(json.dumps(checks))

    artifact, _ = store.get_or_make("integrity", key, make)
    store.open(checkpoint)
    found: dict[str, str | None] = json.loads((store.open(artifact) / "integrity.json").read_text())
    return found


def _check(
    recipe: Recipe,
    model: Model,
    windows: ArtifactRef,
    layers: dict[str, ArtifactRef],
    folder: Path,
    store: Store,
    maxima: dict[str, CacheMaxima],
) -> dict[str, str | None]:
    checks: dict[str, str | None] = {}
    try:
        checkpoint = QuantizedCheckpoint(folder, recipe.model.trust_remote_code)
        checkpoint.verify()
        checks["tensors"] = None
    except ValueError as error:
        return {"tensors": str(error)}
    probe = load_inputs(windows, store, _PROBE_WINDOWS, _PROBE_WINDOWS, _PROBE_LENGTH)
    device = this_worker(recipe.execution).device
    shapes = checkpoint.shapes
    original, per = stream_of(recipe, model, device), recipe.scheme.kv_cache_scale
    round_cache_of(original, {name: each.scales(per) for name, each in maxima.items()})
    written = stream_of(recipe, replace(model, folder=folder), device)
    expected = _probe_logits(
        original,
        probe,
        lambda name: load_layer(store.open(layers[name])),
        shapes,
    )
    found = _probe_logits(written, probe, checkpoint.layer, shapes)
    difference = float((expected - found).abs().max())
    checks["reload"] = (
        None if torch.equal(expected, found) else f"logits differ by up to {difference:g}"
    )
    if recipe.evaluation.served:
        checks["served"] = _served(written, probe, checkpoint, found)
    missing = sorted(set(layers) ^ set(shapes))
    checks["layers"] = f"quantized and planned layers differ: {missing}" if missing else None
    return checks


def _served(
    stream: StreamedModel,
    probe: list[ModelInputs],
    checkpoint: QuantizedCheckpoint,
    expected: Tensor,
) -> str | None:
    """What is wrong with the runtime's predictions, beside those of the formula."""
    stream.linear = runtime = runtime_for(stream.device)
    found = _probe_logits(stream, probe, checkpoint.layer, checkpoint.shapes)
    for reason, layers in runtime.refused.items():
        get_run_logger().warning(f"{layers} layers are computed by the formula: {reason}")
    served, formula = (each.double().log_softmax(-1) for each in (found, expected))
    nats = kl_div(served, formula, reduction="batchmean", log_target=True).item()
    if nats <= SERVED_DIVERGENCE:  # not so where it is not a number
        return None
    return (
        f"the {runtime.runtime.name} runtime's predictions diverge by {nats:.2g} nats a token from"
        f" the formula's, limit {SERVED_DIVERGENCE:g}: set evaluation.arithmetic: definition"
    )


def _probe_logits(
    stream: StreamedModel,
    inputs: list[ModelInputs],
    layer: Any,
    shapes: dict[str, list[int]],
) -> Tensor:
    """[tokens, vocabulary]."""
    stream.outside.quantize(shapes, layer)
    batches = stream.begin(inputs)
    for block in range(stream.block_count):
        replacements = {name: layer(name) for name in stream.linears(block) if name in shapes}
        with stream.block(block, replacements):
            stream.advance(batches)
    return torch.cat([stream.logits(batch.hidden).flatten(0, -2) for batch in batches])
