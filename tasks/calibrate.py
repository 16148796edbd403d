"""Calibration statistics, one task a block.

Artifacts: `statistics`, one for each shared input, and `hidden`, the hidden states before a block,
which is kept only until the block's statistics are there. Hidden states that a later run misses are
computed again from the nearest that are stored.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpq_core.calibration import InputRounding, calibrate_block
from dpq_core.checkpoint import load_layer
from dpq_core.device import resolve_device
from dpq_core.digests import code_digest, digest
from dpq_core.hessian import InputStatistics
from dpq_core.inputs import Batch
from dpq_core.quantize import QuantizedLinear
from dpq_core.recipe import Recipe
from dpq_core.streaming import StreamedModel
from infra.store import ArtifactRef, Store, StoreError
from tasks.model import Model, stream_of
from tasks.progress import stepper
from tasks.windows import load_inputs


@task(name="calibrate", task_run_name="calibrate block {block}", cache_policy=NO_CACHE)
def calibrate(
    recipe: Recipe,
    model: Model,
    windows: ArtifactRef,
    block: int,
    layers: dict[str, ArtifactRef],
) -> dict[str, ArtifactRef]:
    """Statistics of a block's inputs, by the shared input's name.

    Args:
        layers: the quantized layers of all earlier blocks, with `propagation: quantized`; else
            empty.
    """
    store = Store(recipe.execution.store)
    stream = stream_of(recipe, model, resolve_device(recipe.execution.device))
    keys = _Keys(recipe, model, windows, layers, stream)
    wanted = {group[0]: keys.statistics(group[0]) for group in stream.groups(block)}
    if found := _find_all(wanted, store):
        return found
    with store.lease(f"calibrate-{digest(wanted)}"):  # the block's forward passes are of all names
        if found := _find_all(wanted, store):
            return found
        return _calibrate(recipe, stream, windows, block, layers, keys, wanted, store)


def _find_all(wanted: Mapping[str, str], store: Store) -> dict[str, ArtifactRef] | None:
    found = {name: store.find("statistics", key) for name, key in wanted.items()}
    present = {name: artifact for name, artifact in found.items() if artifact}
    return present if len(present) == len(wanted) else None


def _calibrate(
    recipe: Recipe,
    stream: StreamedModel,
    windows: ArtifactRef,
    block: int,
    layers: dict[str, ArtifactRef],
    keys: "_Keys",
    wanted: Mapping[str, str],
    store: Store,
) -> dict[str, ArtifactRef]:
    batches = _batches_before(block, recipe, stream, windows, layers, keys, store)
    original = recipe.calibration.propagation == "original"
    rounding = InputRounding.of(recipe.scheme, recipe.calibration)
    passes = 2 if rounding and rounding.static else 1
    step = stepper("calibrate: batches of a block", passes * len(batches))
    statistics = calibrate_block(stream, block, batches, rounding, original, step)
    made = {
        name: store.get_or_make("statistics", key, _saver(statistics.pop(name)))[0]
        for name, key in wanted.items()
    }
    if original and block + 1 < stream.block_count:
        _store_hidden(batches, block + 1, keys, store)
    if original:
        _remove_hidden(block, keys, store)
    return made


def load_statistics(artifact: ArtifactRef, store: Store) -> InputStatistics:
    """Inverse of how `calibrate` stores them."""
    return InputStatistics.from_tensors(load_file(store.open(artifact) / "statistics.safetensors"))


class _Keys:
    """Store keys: the digests of all that hidden states and statistics depend on."""

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        windows: ArtifactRef,
        layers: Mapping[str, ArtifactRef],
        stream: StreamedModel,
    ) -> None:
        rounding = InputRounding.of(recipe.scheme, recipe.calibration)
        self._rounding = rounding.key() if rounding else None
        self._layers, self._stream = layers, stream
        self._base: dict[str, Any] = {
            "code": code_digest("dpq_core.calibration"),
            "model": model.digest,
            "windows": windows.sha256,
            "batch_size": recipe.calibration.batch_size,
            "device": resolve_device(recipe.execution.device).type,
        }

    def hidden(self, block: int) -> str:
        return digest({**self._base, "before_block": block, "layers": self._upstream(block)})

    def statistics(self, name: str) -> str:
        upstream = [artifact.sha256 for artifact in self._layers.values()]
        return digest({**self._base, "input": name, "rounding": self._rounding, "layers": upstream})

    def _upstream(self, block: int) -> list[str]:
        if not self._layers:
            return []
        before = {name for index in range(block) for name in self._stream.linears(index)}
        return [a.sha256 for name, a in self._layers.items() if name in before]


def _batches_before(
    block: int,
    recipe: Recipe,
    stream: StreamedModel,
    windows: ArtifactRef,
    layers: Mapping[str, ArtifactRef],
    keys: _Keys,
    store: Store,
) -> list[Batch]:
    """Hidden states before a block, from the nearest stored ones or from the inputs."""
    inputs = load_inputs(windows, store, recipe.calibration.batch_size)
    nearest, hidden = _nearest_hidden(block, keys, store)
    if hidden is None:
        batches = stream.begin(inputs)
    else:
        batches = [Batch.of(each, x) for each, x in zip(inputs, hidden, strict=True)]
    for index in range(nearest, block):
        replacements = _load_layers(index, layers, stream, store)
        with stream.block(index, replacements):
            stream.advance(batches)
    if nearest < block:
        _store_hidden(batches, block, keys, store)
        _remove_hidden(nearest, keys, store)
    return batches


def _nearest_hidden(block: int, keys: _Keys, store: Store) -> tuple[int, list[Tensor] | None]:
    for index in range(block, 0, -1):
        artifact = store.find("hidden", keys.hidden(index))
        try:
            if artifact:
                stored = load_file(store.open(artifact) / "hidden.safetensors")
                return index, [stored[str(number)] for number in range(len(stored))]
        except (StoreError, FileNotFoundError):  # another run had no more use for it just now
            continue
    return 0, None


def _remove_hidden(block: int, keys: _Keys, store: Store) -> None:
    if spent := store.find("hidden", keys.hidden(block)):
        store.remove(spent)


def _load_layers(
    index: int,
    layers: Mapping[str, ArtifactRef],
    stream: StreamedModel,
    store: Store,
) -> dict[str, QuantizedLinear]:
    linears = stream.linears(index)
    return {name: load_layer(store.open(layers[name])) for name in linears if name in layers}


def _store_hidden(batches: Sequence[Batch], block: int, keys: _Keys, store: Store) -> None:
    def make(folder: Path) -> None:
        hidden = {str(n): batch.hidden.contiguous() for n, batch in enumerate(batches)}
        save_file(hidden, folder / "hidden.safetensors")

    store.get_or_make("hidden", keys.hidden(block), make)


def _saver(statistics: InputStatistics) -> Any:
    def make(folder: Path) -> None:
        tensors = {name: tensor.cpu() for name, tensor in statistics.tensors().items()}
        save_file(tensors, folder / "statistics.safetensors")

    return make
