"""GPTQ files: W4A16 wherever GPTQ runs, and the layout that Gaudi's formats share.

    qweight [K/8, N] int32    codes k along K, lowest nibble first
    qzeros  [K/g, N/8] int32  z − 1 along N, lowest nibble first
    scales  [K/g, N] fp16     s4 · s8
    g_idx   [K] int32         column // group_size (`desc_act: false`)

A quantized output head is told by `lm_head: true`, as GPTQModel and vLLM have it.

z − 1 has no place for z = 0, and readers differ in what they make of it (−1 & 15, then 16, or 0, or
a carry into the neighbour). A group with z = 0 and no code 15 moves up by one, codes and zero
point, which stands for the same values. Where one remains, the file is of version 2, which stores
z itself. Layout: AutoGPTQ's and GPTQModel's `qlinear`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpq_core.arithmetic.packing import pack_codes
from dpq_core.checkpoint.exports.format import (
    Arithmetic,
    Format,
    Quantization,
    Target,
    embedding_obstacle,
    left_out,
)
from dpq_core.checkpoint.native import QuantizedCheckpoint, load_model
from dpq_core.layer.records import QuantizedLinear, QuantizedWeight
from dpq_core.recipe.scheme import Scheme


def layout_obstacle(target: Target) -> str | None:
    """What the layout itself cannot hold."""
    rows, features, scheme = target.rows, target.features, target.scheme
    if scheme.method == "none" and scheme.activations == "none":
        return None
    if reason := embedding_obstacle(target):
        return reason
    if scheme.bits == 8 or scheme.method == "none":
        return (
            "it holds 4-bit weights only: give the layer the choice w4a8 or bf16, or export as "
            "compressed-tensors"
        )
    if scheme.group_size != target.base.group_size:
        return (
            f"group_size {scheme.group_size} is not the checkpoint's {target.base.group_size}, and "
            "it knows one for all: give the layer the choice w4a8, or export as compressed-tensors"
        )
    if features % scheme.group_size or features % 8:
        return (
            f"{features} inputs are no multiple of 8 and of group_size {scheme.group_size}: give "
            "the layer the choice bf16, or choose another group_size"
        )
    if rows % 8:
        return f"{rows} outputs are no multiple of 8: give the layer the choice bf16"
    return None


def layout_config(checkpoint: QuantizedCheckpoint) -> Quantization:
    """What the formats of this layout say alike. Layers in 16 bits are named as GPTQModel does."""
    return {
        "bits": 4,
        "group_size": checkpoint.scheme.group_size,
        "sym": all(scheme.symmetric for scheme in _packed(checkpoint).values()),
        "desc_act": False,
        **({"lm_head": True} if any(map(checkpoint.outside.get, _packed(checkpoint))) else {}),
        "dynamic": {f"-:^{name}$".replace(".", r"\."): {} for name in left_out(checkpoint)},
    }


def _packed(checkpoint: QuantizedCheckpoint) -> dict[str, Scheme]:
    return {name: s for name, s in checkpoint.schemes.items() if s.method != "none"}


def lowest_zero_point(checkpoint: QuantizedCheckpoint) -> tuple[int, str]:
    """The smallest zero point once groups have moved up, and a layer that has it."""
    found = (16, "")
    for name in _packed(checkpoint):
        weight = checkpoint.layer(name).weight
        assert isinstance(weight, QuantizedWeight)
        found = min(found, (int(moved_up(weight)[1].min()), name))
    return found


def moved_up(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Codes and zero points of the same values, zero points of 0 made 1 where codes allow it."""
    zero_point = weight.grid.zero_point
    groups = weight.codes.unflatten(1, (-1, weight.grid.group_size))
    moves = ((zero_point == 0) & (groups.amax(2) < 15)).to(torch.uint8)
    return (groups + moves.unsqueeze(2)).flatten(1), zero_point + moves


def packed(weight: QuantizedWeight, offset: int) -> dict[str, Tensor]:
    """qweight and qzeros; `offset` is what zero points are stored without."""
    codes, zero_point = moved_up(weight)
    return {"qweight": pack_codes(codes).T, "qzeros": pack_codes((zero_point - offset).T)}


def layout_shapes(target: Target) -> dict[str, tuple[list[int], str]]:
    """Shapes and types of the tensors of `packed`."""
    return {
        "qweight": ([target.features // 8, target.rows], "I32"),
        "qzeros": ([target.groups, target.rows // 8], "I32"),
    }


def _config(checkpoint: QuantizedCheckpoint) -> Quantization:
    version = "gptq" if lowest_zero_point(checkpoint)[0] > 0 else "gptq_v2"
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        **layout_config(checkpoint),
    }


def _tensors(layer: QuantizedLinear, _: Target, config: Quantization) -> dict[str, Tensor]:
    weight = layer.weight
    assert isinstance(weight, QuantizedWeight)
    columns = torch.arange(weight.codes.shape[1], dtype=torch.int32)
    return {
        **packed(weight, offset=1 if config["checkpoint_format"] == "gptq" else 0),
        "scales": _scales(weight).T,
        "g_idx": columns // weight.grid.group_size,
    }


def _scales(weight: QuantizedWeight) -> Tensor:
    """s4 · s8 in FP16 [N, K/g]."""
    return (weight.grid.group_scale.float() * weight.grid.channel_scale).half()


def _shapes(target: Target) -> dict[str, tuple[list[int], str]]:
    return {
        **layout_shapes(target),
        "scales": ([target.groups, target.rows], "F16"),
        "g_idx": ([target.features], "I32"),
    }


def _bits(target: Target) -> float:
    return 4 + 20 / target.scheme.group_size + 32 / target.rows


class _Reference(nn.Module):
    """A linear of the dequantized weight, rounded once to the model's type."""

    def __init__(self, layer: QuantizedLinear, bias: Tensor | None) -> None:
        super().__init__()
        self.layer, self.bias = layer, bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], both BF16 or FP16."""
        weight = self.layer.weight
        if isinstance(weight, QuantizedWeight):
            steps = weight.codes.float().unflatten(1, (-1, weight.grid.group_size))
            steps = (steps - weight.grid.zero_point.unsqueeze(2)) * _scales(weight).unsqueeze(2)
            weight = steps.flatten(1)
        assert isinstance(weight, Tensor)
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def _load(folder: Path, _: QuantizedCheckpoint) -> Any:
    return load_model(folder)


GPTQ = Format(
    obstacle=layout_obstacle,
    config=_config,
    tensors=_tensors,
    shapes=_shapes,
    bits=_bits,
    load=_load,
    reader="our own, which reads GPTQ files of others",
    arithmetic=Arithmetic(
        reference=_Reference,
        tolerance=0.25,
        reason="GPTQ computes in 16 bits: neither weights nor activations are rounded to E4M3",
    ),
    without_cache="its layout has no place for them",
)
