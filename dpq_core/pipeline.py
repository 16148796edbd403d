"""The whole of quantization in plain Python: checkpoint in, checkpoint out, nothing orchestrated.

`flows/` does the same with one Prefect task a stage and gives the same bytes.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpq_core.calibration.statistics import (
    BlockStatistics,
    InputRounding,
    Step,
    TokenWeights,
    cache_maxima,
    calibrate_block,
)
from dpq_core.checkpoint.native import load_layer, save_layer
from dpq_core.checkpoint.writing import write_checkpoint
from dpq_core.layer.kv_cache import CacheMaxima
from dpq_core.layer.quantize import quantize_or_keep
from dpq_core.layer.records import QuantizedLinear
from dpq_core.layer.shared_input import SharedInput
from dpq_core.model.context import check_ids, check_lengths
from dpq_core.model.inputs import Batch, ModelInputs, batches_of
from dpq_core.model.kv_cache import check_cache
from dpq_core.model.plan import (
    Plan,
    PlannedLayer,
    plan_layers,
    readers_of_one_input,
    weight_of,
)
from dpq_core.model.proof import prove
from dpq_core.model.source import check_source
from dpq_core.model.streaming import StreamedModel, empty_model
from dpq_core.recipe import CalibrationSection
from dpq_core.recipe.scheme import Scheme


def quantize_checkpoint(
    source: Path,
    destination: Path,
    windows: Tensor | Sequence[ModelInputs],  # tokens [n, length] int64, or inputs with images
    scheme: Scheme,
    calibration: CalibrationSection,
    about: dict[str, Any],
    choices: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Calibrate, quantize and write a checkpoint; returns its manifest.

    `choices` is for single layers, see `plan_layers`. An accelerator that is the `device` keeps a
    block, its statistics and the calibration's hidden states.
    Finished layers wait in a temporary folder: memory is bounded by one block.

    Raises:
        ArchitectureError, CheckpointError, ContextError, FactorizationError, NotFiniteError: see
            the stages.
    """
    check_source(source, keeps=scheme.keeps)
    prove(empty_model(source))
    if scheme.kv_cache == "fp8":
        check_cache(empty_model(source))
    stream = StreamedModel(source, device, images=calibration.image_column is not None)
    plan = plan_layers(stream, scheme, choices)
    inputs = batches_of(windows, calibration.batch_size)
    for each in inputs:
        config, ids = stream.model.config.get_text_config(), each["input_ids"]
        check_lengths(config, {"the length of a window": ids.shape[1]})
        check_ids(config, None, ids, "windows")
    batches = stream.begin(inputs)
    for batch in batches:
        batch.hidden = batch.hidden.to(stream.device)
    maxima = dict[str, CacheMaxima]()
    with tempfile.TemporaryDirectory() as finished:
        for layers in _by_block(stream, plan, batches, scheme, calibration, maxima):
            for name, layer in layers.items():
                folder = Path(finished, name)
                folder.mkdir()
                save_layer(folder, layer.to("cpu"))

        def finished_layer(name: str) -> QuantizedLinear:
            return load_layer(Path(finished, name))

        destination.mkdir(parents=True)
        return write_checkpoint(
            destination,
            stream.reader,
            stream.dtype,
            plan,
            scheme,
            finished_layer,
            about,
            stream.wide,
            maxima,
        )


def _by_block(
    stream: StreamedModel,
    plan: Plan,
    batches: Sequence[Batch],
    scheme: Scheme,
    calibration: CalibrationSection,
    maxima: dict[str, CacheMaxima],
) -> Iterator[dict[str, QuantizedLinear]]:
    """The quantized layers of one block after the other, by name. Where they are corrected, the
    16-bit model's hidden states go along with those of the quantized one. maxima: gets those of
    attentions, where the scheme keeps keys and values in FP8."""
    seen_as = InputRounding.of(scheme, calibration), TokenWeights.of(calibration)
    fed, corrected = calibration.propagation, calibration.correction > 0
    originals = [batch.clone() for batch in batches] if corrected else []
    cache = scheme.kv_cache == "fp8"
    if embedding := plan.of_block(-1):
        yield dict(_quantized(stream, embedding, {}, calibration))
    for block in range(plan.blocks):
        done = dict[str, QuantizedLinear]()
        for inputs in plan.inputs_by_step(block) if fed == "groups" else [None]:
            step = None if inputs is None else Step(inputs, done, corrected)
            advance = fed == "original"
            passed = stream, block, batches, *seen_as, advance, step, originals
            found = calibrate_block(*passed, cache)
            maxima |= cache_maxima(stream, block, found)
            done |= _quantized(stream, plan.of_block(block, inputs), found, calibration)
        yield done
        if block == stream.block_count:  # the head
            return
        if fed != "original":
            with stream.block(block, done):
                stream.advance(batches)
        if originals:
            with stream.block(block):
                stream.advance(originals)


def _quantized(
    stream: StreamedModel,
    layers: Sequence[PlannedLayer],
    statistics: BlockStatistics,
    calibration: CalibrationSection,
) -> Iterator[tuple[str, QuantizedLinear]]:
    """A block's layers, those that read one input together; uses up the statistics."""
    for readers in readers_of_one_input(layers):
        seen = readers[0].statistics
        inputs = SharedInput(statistics.pop(seen)) if seen else None  # of an embedding: none
        for layer in readers:
            weight = weight_of(stream.reader, layer, stream.dtype).to(stream.device)
            yield (
                layer.name,
                quantize_or_keep(
                    weight,
                    inputs,
                    layer.scheme,
                    calibration.min_tokens_per_input,
                    calibration.correction,
                    calibration.where_rounding_wins,
                ),
            )
