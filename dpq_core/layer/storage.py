"""The tensors that a checkpoint stores for a layer."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dpq_core.arithmetic.packing import (
    pack_codes,
    pack_zero_points,
    unpack_codes,
    unpack_zero_points,
)
from dpq_core.layer.grid import SYMMETRIC_ZERO_POINT, Grid
from dpq_core.layer.records import LayerReport, QuantizedLinear, QuantizedWeight, RoundedWeight
from dpq_core.recipe.scheme import Scheme

_STORED_REPORT = LayerReport(error=float("nan"), damp_frac=float("nan"), codes_moved=0)


def layer_tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors that a checkpoint stores for a layer, by the name that follows the layer's."""
    tensors: dict[str, Tensor] = {}
    if isinstance(layer.weight, RoundedWeight):
        tensors["weight"] = layer.weight.values
        tensors["channel_scale"] = layer.weight.channel_scale
    elif isinstance(layer.weight, QuantizedWeight):
        grid = layer.weight.grid
        tensors["weight_packed"] = pack_codes(layer.weight.codes)
        tensors["group_scale"] = grid.group_scale
        if not layer.scheme.symmetric:
            tensors["zero_point"] = pack_zero_points(grid.zero_point)
        if grid.inner is not None:
            tensors["channel_scale"] = grid.channel_scale
    else:
        tensors["weight"] = layer.weight
    if layer.input_scale is not None:
        tensors["input_scale"] = layer.input_scale
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def expected_shapes(rows: int, features: int, scheme: Scheme) -> dict[str, tuple[list[int], str]]:
    """Shape and safetensors type of each tensor of a stored layer [rows, features]. A weight that
    is kept is BF16 here, and F16 in models that run in it."""
    groups = -(-features // scheme.group_size)
    shapes: dict[str, tuple[list[int], str]] = {}
    if scheme.method == "none":
        shapes["weight"] = ([rows, features], "BF16")
    elif scheme.bits == 8:
        is_float = scheme.inner_format is not None and scheme.inner_format.is_float
        shapes["weight"] = ([rows, features], "F8_E4M3" if is_float else "I8")
        shapes["channel_scale"] = ([rows, 1], "F32")
    else:
        shapes["weight_packed"] = ([rows, -(-features // 8)], "I32")
        shapes["group_scale"] = ([rows, groups], "BF16")
        if not scheme.symmetric:
            shapes["zero_point"] = ([rows, -(-groups // 2)], "U8")
        if scheme.inner_format is not None:
            shapes["channel_scale"] = ([rows, 1], "F32")
    if scheme.activations == "static":
        shapes["input_scale"] = ([], "F32")
    return shapes


def stored_bytes(rows: int, features: int, scheme: Scheme) -> int:
    """Size of a stored layer: codes, scales and zero points."""
    shapes = expected_shapes(rows, features, scheme).values()
    return sum(math.prod(shape) * _TYPE_BYTES[dtype] for shape, dtype in shapes)


_TYPE_BYTES = {"I32": 4, "F32": 4, "BF16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1}


def layer_from_tensors(
    tensors: Mapping[str, Tensor], features: int, scheme: Scheme
) -> QuantizedLinear:
    """Inverse of `layer_tensors`; the report is not stored with the tensors.

    Raises:
        KeyError: a tensor is missing. ValueError: a shape does not fit.
    """
    input_scale = tensors["input_scale"] if scheme.activations == "static" else None
    if scheme.method == "none":
        return QuantizedLinear(scheme, tensors["weight"], input_scale, _STORED_REPORT)
    if scheme.bits == 8:
        rounded = RoundedWeight(tensors["weight"], tensors["channel_scale"])
        return QuantizedLinear(scheme, rounded, input_scale, _STORED_REPORT)
    group_scale = tensors["group_scale"]
    if scheme.symmetric:
        zero_point = torch.full_like(group_scale, SYMMETRIC_ZERO_POINT, dtype=torch.uint8)
    else:
        zero_point = unpack_zero_points(tensors["zero_point"], group_scale.shape[1])
    inner = scheme.inner_format
    ones = torch.ones(len(group_scale), 1, dtype=torch.float32, device=group_scale.device)
    grid = Grid(
        channel_scale=ones if inner is None else tensors["channel_scale"],
        group_scale=group_scale,
        zero_point=zero_point,
        group_size=scheme.group_size,
        inner=inner,
    )
    codes = unpack_codes(tensors["weight_packed"], features)
    return QuantizedLinear(scheme, QuantizedWeight(codes, grid), input_scale, _STORED_REPORT)
