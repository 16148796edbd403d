"""Gaudi: Intel Neural Compressor's W4A8, and AutoRound's `fp8_to_int_sym`, which it reads too.

Both use GPTQ's layout (`gptq.py`) and one power of two for a whole weight, s8, so that Gaudi 2's
FP8 units, whose maximum is 240, scale for free.

                inc                            fp8_to_int
    scales      s4 [K/g, N] bf16               s4 · s8 [K/g, N] bf16 (the reader divides by s8)
    s8          scale_bf16_to_fp8 [1] bf16     w_bf16_to_fp8_scale [1] bf16
    sx          measured by the reader         act_scales [1] bf16
    zero points z − 1, none of them 0          8: signed codes only

Powers of two make BF16 hold s8, s4 · s8 and sx exactly, and Gaudi computes E4M3(s4 · (k − z)) as
`dpq_core.layer.grid` does: what is stored is what was evaluated. The codes k are stored themselves;
Neural Compressor's own exporter finds them by quantizing once more. `inc` has no place for sx:
Neural Compressor measures the activations, and the keys and values of an FP8 cache, when it
prepares the model. Names: `neural_compressor`
(`mixed_low_precision/modules.py`) and AutoRound (`qlinear_triton_act.py`).
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dpq_core.arithmetic.packing import unpack_codes
from dpq_core.checkpoint.exports.format import Arithmetic, ExportError, Format, Quantization, Target
from dpq_core.checkpoint.exports.gptq import (
    layout_config,
    layout_obstacle,
    layout_shapes,
    lowest_zero_point,
    packed,
)
from dpq_core.checkpoint.native import QuantizedCheckpoint, load_quantized
from dpq_core.layer.grid import Grid
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.records import QuantizedLinear, QuantizedWeight
from dpq_core.model.reader import CheckpointReader

_NEEDS: dict[str, Any] = {
    "inner": "e4m3",
    "fp8_max": 240,
    "channel_scale": "tensor",
    "power_of_two": True,
}
_PRESET = "scheme.preset gaudi-inc has all that it needs"


def _obstacle(needs: dict[str, Any], target: Target) -> str | None:
    scheme = target.scheme
    if scheme.method != "none" and scheme.bits == 4:
        for field, value in needs.items():
            if (found := getattr(scheme, field)) != value:
                return f"it needs {field}: {value}, not {found}: {_PRESET}"
        if target.outside == "head":
            return "Neural Compressor keeps the output head in 16 bits: leave it out of layers"
    return layout_obstacle(target)


def _inc_config(checkpoint: QuantizedCheckpoint) -> Quantization:
    lowest, name = lowest_zero_point(checkpoint)
    if lowest == 0:
        raise ExportError(
            f"inc cannot hold {name}: a group's zero point is 0, and it stores zero points less "
            "one: set scheme.symmetric: true"
        )
    return {"quant_method": "gptq", "checkpoint_format": "gptq", **layout_config(checkpoint)}


def _fp8_to_int_config(checkpoint: QuantizedCheckpoint) -> Quantization:
    return {
        "quant_method": "auto-round",
        "backend": "auto_round:fp8_to_int_sym",
        "data_type": "fp8_to_int_sym",
        "act_bits": 8,
        "act_data_type": "fp8",
        "act_dynamic": False,
        **layout_config(checkpoint),
    }


def _inc_tensors(layer: QuantizedLinear, _: Target, __: Quantization) -> dict[str, Tensor]:
    weight = layer.weight
    assert isinstance(weight, QuantizedWeight)
    return {
        **packed(weight, offset=1),
        "scales": weight.grid.group_scale.T,
        "scale_bf16_to_fp8": _tensor_scale(weight),
    }


def _fp8_to_int_tensors(layer: QuantizedLinear, _: Target, __: Quantization) -> dict[str, Tensor]:
    weight = layer.weight
    assert isinstance(weight, QuantizedWeight)
    assert layer.input_scale is not None
    scale = _tensor_scale(weight)
    return {
        **packed(weight, offset=1),
        "scales": (weight.grid.group_scale * scale).T,
        "w_bf16_to_fp8_scale": scale,
        "act_scales": layer.input_scale.reshape(1).bfloat16(),
    }


def _tensor_scale(weight: QuantizedWeight) -> Tensor:
    """s8 [1] bf16, exact: one power of two for all rows."""
    return weight.grid.channel_scale[0].bfloat16()


def _shapes(scalars: tuple[str, ...], target: Target) -> dict[str, tuple[list[int], str]]:
    return {
        **layout_shapes(target),
        "scales": ([target.groups, target.rows], "BF16"),
        **{name: ([1], "BF16") for name in scalars},
    }


def _bits(target: Target) -> float:
    return 4 + 20 / target.scheme.group_size


def _load(scale_name: str, folder: Path, checkpoint: QuantizedCheckpoint) -> Any:
    """The export's tensors in our arithmetic, which is Gaudi's; what a file of `inc` does not hold
    (sx) is the checkpoint's."""
    reader = CheckpointReader(folder)
    names = iter(checkpoint.shapes)  # in the order in which `load_quantized` asks

    def stored(layer: QuantizedLinear, bias: Tensor | None) -> W4A8Linear:
        name = next(names)
        if isinstance(layer.weight, Tensor):
            return W4A8Linear(layer, bias)
        rows, features = checkpoint.shapes[name]
        parts = ("qweight", "qzeros", "scales", scale_name)
        qweight, qzeros, scales, scale = (reader.tensor(f"{name}.{part}") for part in parts)
        absorbed = scale_name == "w_bf16_to_fp8_scale"
        grid = Grid(
            channel_scale=scale.float().expand(rows, 1).contiguous(),
            group_scale=(scales / scale if absorbed else scales).T.contiguous(),
            zero_point=unpack_codes(qzeros, rows).T + 1,
            group_size=layer.scheme.group_size,
            inner=layer.scheme.inner_format,
        )
        weight = QuantizedWeight(unpack_codes(qweight.T, features), grid)
        static = reader.tensor(f"{name}.act_scales")[0].float() if absorbed else layer.input_scale
        return W4A8Linear(QuantizedLinear(layer.scheme, weight, static, layer.report), bias)

    return load_quantized(checkpoint.folder, linear=stored)


_EXACT = Arithmetic(W4A8Linear, tolerance=0.0, reason="the arithmetic is the same")

_WITHOUT_CACHE = "Neural Compressor measures them itself when it prepares a model"

INC = Format(
    obstacle=partial(_obstacle, _NEEDS),
    config=_inc_config,
    tensors=_inc_tensors,
    shapes=partial(_shapes, ("scale_bf16_to_fp8",)),
    bits=_bits,
    load=partial(_load, "scale_bf16_to_fp8"),
    reader="our own, from the format's description (Gaudi itself was not there)",
    arithmetic=_EXACT,
    without_cache=_WITHOUT_CACHE,
)

FP8_TO_INT = Format(
    obstacle=partial(_obstacle, _NEEDS | {"symmetric": True, "activations": "static"}),
    config=_fp8_to_int_config,
    tensors=_fp8_to_int_tensors,
    shapes=partial(_shapes, ("w_bf16_to_fp8_scale", "act_scales")),
    bits=_bits,
    load=partial(_load, "w_bf16_to_fp8_scale"),
    reader="our own, from the format's description (Gaudi itself was not there)",
    arithmetic=_EXACT,
    without_cache=_WITHOUT_CACHE,
)
