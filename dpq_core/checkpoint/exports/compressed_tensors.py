"""compressed-tensors, the format of vLLM and llm-compressor, which transformers loads as well.

4 bits, `pack-quantized`, groups along the input [N, K], g columns each:

    weight_packed      [N, K/8] int32    codes k along K, lowest nibble first
    weight_scale       [N, K/g]          s4 · s8 in the model's type, BF16 or FP16
    weight_zero_point  [N/8, K/g] int32  z along N, lowest nibble first; asymmetric only
    weight_shape       [2] int64
    input_scale        [1] fp32          sx; static activations only

8 bits, `float-quantized` (E4M3) or `int-quantized`, one scale a row; INT8 weights with inputs in
16 bits `pack-quantized`, four codes plus 128 an int32:

    weight [N, K], or weight_packed [N, K/4] int32; weight_scale [N, 1]; input_scale as above

An FP8 cache is `kv_cache_scheme`, with `k_scale` and `v_scale` of each attention as the native
checkpoint has them: [1], or [heads, 1, 1] where heads have their own.

Layers with different schemes are different `config_groups`, with their names as targets; those in
16 bits are in `ignore`. A quantized output head is a target by its name (vLLM's is no `Linear`); an
embedding, and a head that is tied to one, have no place. Each group names its own format: the
library guesses `int-quantized`, a byte a weight, for packed weights with FP8 inputs.

The library multiplies the codes with scales in the model's type and does not round the product to
E4M3; it divides and multiplies activations in the model's type. vLLM on Hopper does round the
product, with scales as `group_scale: e4m3` makes them. Layouts: compressed-tensors 0.19.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpq_core.arithmetic.formats import FORMATS, round_to
from dpq_core.arithmetic.packing import pack_codes
from dpq_core.checkpoint.exports.format import (
    Arithmetic,
    Format,
    Quantization,
    Target,
    embedding_obstacle,
    left_out,
)
from dpq_core.checkpoint.exports.vllm import takes_fp8_inputs
from dpq_core.checkpoint.importers import load_compressed_tensors
from dpq_core.checkpoint.native import QuantizedCheckpoint
from dpq_core.layer.records import QuantizedLinear, QuantizedWeight, RoundedWeight
from dpq_core.recipe.scheme import Scheme


def _obstacle(target: Target) -> str | None:
    scheme, features = target.scheme, target.features
    if scheme.method == "none":
        if scheme.activations != "none":
            return "16-bit weights with 8-bit activations: give the layer the choice bf16"
        return None
    if reason := embedding_obstacle(target):
        return reason
    if scheme.inner == "e4m3" and scheme.fp8_max != 448 and scheme.activations != "none":
        return (
            "its readers round activations to E4M3 up to 448, not 240: set scheme.fp8_max: 448, "
            "or export as inc"
        )
    if scheme.bits == 4 and features % scheme.group_size:
        return (
            f"{features} inputs are no multiple of group_size {scheme.group_size}, which its "
            "readers need: give the layer the choice w8a8 or bf16, or choose another group_size"
        )
    return None


def vllm_obstacle(targets: Sequence[Target]) -> str | None:
    """Why vLLM has no kernel for these layers, or None. From its documentation and source: four
    bits with FP8 activations run on Hopper, symmetric, in groups of 128, with a scale a token;
    on Ada by its setting (`vllm.environment_of`), for all files of W4A16 at once; linears that it
    fuses need one scheme."""
    fused: dict[str, Scheme] = {}
    variables = any(takes_fp8_inputs(target.scheme) for target in targets)
    for target in targets:
        scheme, name = target.scheme, target.name
        if scheme.bits == 4 and rounds_inputs(scheme):
            fits = scheme.inner == "e4m3" and scheme.symmetric and scheme.group_size == 128
            fits = fits and scheme.activations == "dynamic"
            if not fits or target.rows % 128 or target.features % 128:
                return (
                    f"{name} is not symmetric in groups of 128 with a scale a token and sides that "
                    "are multiples of 128 (scheme.preset hopper-vllm)"
                )
        if takes_fp8_inputs(scheme) and not (scheme.symmetric and scheme.group_size in _MARLIN):
            return f"{name} is not symmetric in groups of 32, 64 or 128 (scheme.preset ada-vllm)"
        if variables and scheme.bits == 8 and _packed(scheme):
            return f"{name} has 8-bit weights, which Marlin takes no FP8 inputs for: choose w8a8"
        parent, _, member = name.rpartition(".")
        group = next((label for label, parts in _FUSED.items() if member in parts), member)
        if fused.setdefault(f"{parent}.{group}", scheme) != scheme:
            return f"it fuses {name} with layers of another scheme (repair.together keeps them one)"
    return None


def rounds_inputs(scheme: Scheme) -> bool:
    """Whether the format says of a layer that its inputs are of 8 bits. Where no weight is rounded
    (preset ada-vllm) it does not: what a reader computes with is then the reader's own setting."""
    return scheme.activations != "none" and scheme.inner != "none"


_MARLIN = (32, 64, 128)  # groups that it takes
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def _config(checkpoint: QuantizedCheckpoint) -> Quantization:
    members: dict[str, list[str]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, scheme in checkpoint.schemes.items():
        if scheme.method == "none":
            continue
        group = _group(scheme)
        key = str(group)
        groups[key] = group
        members.setdefault(key, []).append(name)
    single = len(groups) == 1
    # By vLLM's name a quantized head is no `Linear`.
    heads = [name for names in members.values() for name in names if checkpoint.outside[name]]
    all_linears = ["Linear", *heads]
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": _cache(checkpoint.scheme),
        "config_groups": {
            f"group_{number}": groups[key] | {"targets": all_linears if single else members[key]}
            for number, key in enumerate(groups)
        },
        "ignore": left_out(checkpoint),
    }


def _cache(scheme: Scheme) -> dict[str, Any] | None:
    """Scales of powers of two: the library's division in the model's type is ours in FP32."""
    if scheme.kv_cache == "none":
        return None
    strategy = "attn_head" if scheme.kv_cache_scale == "head" else "tensor"
    return {
        "num_bits": 8,
        "type": "float",
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
    }


def _group(scheme: Scheme) -> dict[str, Any]:
    number: dict[str, Any] = {"type": "int" if scheme.inner == "int8" else "float", "num_bits": 8}
    if scheme.bits == 4:
        weights = {"num_bits": 4, "type": "int", "strategy": "group"}
        weights |= {"group_size": scheme.group_size, "symmetric": scheme.symmetric}
    else:
        weights = number | {"strategy": "channel", "symmetric": True}
    if _packed(scheme):
        packing = "pack-quantized"
    else:
        packing = "int-quantized" if scheme.inner == "int8" else "float-quantized"
    inputs = None
    if rounds_inputs(scheme):
        dynamic = scheme.activations == "dynamic"
        inputs = number | {"strategy": "token" if dynamic else "tensor", "symmetric": True}
        inputs["dynamic"] = dynamic
    return {
        "format": packing,
        "weights": weights | {"dynamic": False},
        "input_activations": inputs,
        "output_activations": None,
    }


def _packed(scheme: Scheme) -> bool:
    """Whether codes are packed into words: integers that are multiplied in 16 bits, as vLLM's
    kernels for these read them."""
    return scheme.bits == 4 or (scheme.inner == "int8" and scheme.activations == "none")


def _tensors(layer: QuantizedLinear, target: Target, _: Quantization) -> dict[str, Tensor]:
    weight = layer.weight
    assert not isinstance(weight, Tensor)
    tensors = {"weight_scale": _scale(weight, target.dtype)}
    if not _packed(layer.scheme):
        assert isinstance(weight, RoundedWeight)
        tensors["weight"] = weight.values
    elif isinstance(weight, RoundedWeight):
        tensors["weight_packed"] = pack_codes((weight.values.short() + 128).to(torch.uint8), 8)
        tensors["weight_shape"] = torch.tensor(weight.values.shape)
    else:
        tensors["weight_packed"] = pack_codes(weight.codes)
        tensors["weight_shape"] = torch.tensor(weight.codes.shape)
        if not layer.scheme.symmetric:
            tensors["weight_zero_point"] = pack_codes(weight.grid.zero_point.T).T
    if layer.input_scale is not None:
        tensors["input_scale"] = layer.input_scale.reshape(1)
    return tensors


def _scale(weight: QuantizedWeight | RoundedWeight, dtype: torch.dtype) -> Tensor:
    """What a code is multiplied with, in the model's type. [N, K/g], or [N, 1]."""
    if isinstance(weight, RoundedWeight):
        return weight.channel_scale.to(dtype)
    return (weight.grid.group_scale.float() * weight.grid.channel_scale).to(dtype)


def _shapes(target: Target) -> dict[str, tuple[list[int], str]]:
    rows, scheme = target.rows, target.scheme
    shapes: dict[str, tuple[list[int], str]] = {}
    groups = target.groups if scheme.bits == 4 else 1
    shapes["weight_scale"] = ([rows, groups], target.stored_dtype)
    if _packed(scheme):
        shapes["weight_packed"] = ([rows, -(-target.features * scheme.bits // 32)], "I32")
        shapes["weight_shape"] = ([2], "I64")
    else:
        shapes["weight"] = ([rows, target.features], "I8" if scheme.inner == "int8" else "F8_E4M3")
    if scheme.bits == 4 and not scheme.symmetric:
        shapes["weight_zero_point"] = ([-(-rows // 8), groups], "I32")
    if scheme.activations == "static":
        shapes["input_scale"] = ([1], "F32")
    return shapes


def _bits(target: Target) -> float:
    scheme = target.scheme
    if scheme.bits == 8:
        return 8 + 16 / target.features
    return 4 + (16 if scheme.symmetric else 20) / scheme.group_size


class _Reference(nn.Module):
    """A linear in the library's arithmetic: weight and activations in the model's own type."""

    def __init__(self, layer: QuantizedLinear, bias: Tensor | None) -> None:
        super().__init__()
        self.layer, self.bias = layer, bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], both BF16 or FP16."""
        scheme, static = self.layer.scheme, self.layer.input_scale
        if rounds_inputs(scheme):
            scale = _token_scale(x, scheme) if static is None else static.to(x.dtype)
            x = _rounded(x / scale, scheme) * scale
        return nn.functional.linear(x, dequantized(self.layer, x.dtype), self.bias)


def _token_scale(x: Tensor, scheme: Scheme) -> Tensor:
    """Half the format's range meets a token's largest magnitude. [..., in] → [..., 1]."""
    scale = x.abs().amax(-1, keepdim=True) / (127.5 if scheme.inner == "int8" else 448)
    return torch.where(scale == 0, torch.full_like(scale, torch.finfo(x.dtype).eps), scale)


def _rounded(x: Tensor, scheme: Scheme) -> Tensor:
    if scheme.inner == "int8":
        return x.clamp(-128, 127).round()
    return round_to(x, FORMATS["e4m3"]).to(x.dtype)


def dequantized(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] as the library restores it: codes · scale, a product in `dtype`."""
    weight = layer.weight
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    scale = _scale(weight, dtype)
    if isinstance(weight, RoundedWeight):
        return weight.values.to(dtype) * scale
    steps = weight.codes.to(dtype).unflatten(1, (-1, weight.grid.group_size))
    steps = steps - weight.grid.zero_point.to(dtype).unsqueeze(2)
    restored: Tensor = (steps * scale.unsqueeze(2)).flatten(1)
    return restored


def _load(folder: Path, _: QuantizedCheckpoint) -> Any:
    return load_compressed_tensors(folder).eval()


COMPRESSED_TENSORS = Format(
    obstacle=_obstacle,
    config=_config,
    tensors=_tensors,
    shapes=_shapes,
    bits=_bits,
    load=_load,
    reader="transformers with compressed-tensors",
    arithmetic=Arithmetic(
        reference=_Reference,
        tolerance=0.25,
        reason="the reader does not round weights to E4M3, and scales activations in 16 bits",
    ),
)
