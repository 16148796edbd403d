"""The whole of quantization in plain Python: checkpoint in, checkpoint out, nothing orchestrated.

`flows/` does the same with one Prefect task a stage and gives the same bytes.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from dpq_core.calibration import InputRounding, calibrate_block
from dpq_core.checkpoint import write_checkpoint
from dpq_core.plan import plan_layers
from dpq_core.quantize import QuantizedLinear, quantize_layer
from dpq_core.recipe import CalibrationSection
from dpq_core.scheme import Scheme
from dpq_core.streaming import StreamedModel


def quantize_checkpoint(
    source: Path,
    destination: Path,
    windows: Tensor,  # [n, length] int64, calibration tokens
    scheme: Scheme,
    calibration: CalibrationSection,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Calibrate, quantize and write a checkpoint; returns its manifest.

    Raises:
        CheckpointError, FactorizationError, ValueError: see the stages.
    """
    stream = StreamedModel(source)
    plan = plan_layers(stream, scheme)
    rounding = InputRounding.of(scheme, calibration)
    original = calibration.propagation == "original"
    hidden = stream.embed(windows, calibration.batch_size)
    layers: dict[str, QuantizedLinear] = {}
    for block in range(stream.block_count):
        statistics = calibrate_block(
            stream, block, hidden, rounding, calibration.batch_size, advance=original
        )
        members = plan.of_block(block)
        weights = stream.reader.tensors(f"{layer.name}.weight" for layer in members)
        quantized = {
            layer.name: quantize_layer(
                weights[f"{layer.name}.weight"], statistics[layer.statistics], scheme
            )
            for layer in members
        }
        layers |= quantized
        if not original:
            with stream.block(block, quantized, scheme):
                stream.advance(hidden, calibration.batch_size)
    destination.mkdir(parents=True)
    return write_checkpoint(
        destination, stream.reader, stream.dtype, plan, scheme, layers.__getitem__, about
    )
