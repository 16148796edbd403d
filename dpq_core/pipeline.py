"""The whole of quantization in plain Python: checkpoint in, checkpoint out, nothing orchestrated.

`flows/` does the same with one Prefect task a stage and gives the same bytes.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dpq_core.calibration import InputRounding, TokenWeights, calibrate_block
from dpq_core.checkpoint import load_layer, save_layer, write_checkpoint
from dpq_core.inputs import ModelInputs, batches_of
from dpq_core.plan import plan_layers
from dpq_core.quantize import QuantizedLinear, quantize_or_keep
from dpq_core.recipe import CalibrationSection
from dpq_core.scheme import Scheme
from dpq_core.streaming import StreamedModel


def quantize_checkpoint(
    source: Path,
    destination: Path,
    windows: Tensor | Sequence[ModelInputs],  # tokens [n, length] int64, or inputs with images
    scheme: Scheme,
    calibration: CalibrationSection,
    about: dict[str, Any],
    choices: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Calibrate, quantize and write a checkpoint; returns its manifest.

    `choices` is for single layers, see `plan_layers`.
    Finished layers wait in a temporary folder: memory is bounded by one block.

    Raises:
        CheckpointError, FactorizationError, ValueError: see the stages.
    """
    stream = StreamedModel(source, images=calibration.image_column is not None)
    plan = plan_layers(stream, scheme, choices)
    rounding, weights = InputRounding.of(scheme, calibration), TokenWeights.of(calibration)
    original = calibration.propagation == "original"
    batches = stream.begin(batches_of(windows, calibration.batch_size))
    with tempfile.TemporaryDirectory() as finished:
        for block in range(plan.blocks):
            statistics = calibrate_block(stream, block, batches, rounding, weights, original)
            members = plan.of_block(block)
            quantized: dict[str, QuantizedLinear] = {}
            for layer in members:
                weight = stream.reader.tensor(f"{layer.name}.weight")
                inputs = statistics[layer.statistics]
                quantized[layer.name] = quantize_or_keep(
                    weight, inputs, layer.scheme, calibration.min_tokens_per_input
                )
                folder = Path(finished, layer.name)
                folder.mkdir()
                save_layer(folder, quantized[layer.name])
            if not original:
                with stream.block(block, quantized):
                    stream.advance(batches)

        def finished_layer(name: str) -> QuantizedLinear:
            return load_layer(Path(finished, name))

        destination.mkdir(parents=True)
        return write_checkpoint(
            destination, stream.reader, stream.dtype, plan, scheme, finished_layer, about
        )
