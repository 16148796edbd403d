"""`preset: hopper-vllm`: what vLLM makes of an export's scales when it loads it is what was gated.

vLLM's conversion, from its description: the group scales of a row become FP8 by a scale of the row
(its largest over 448, at least 1 / (448 · 512)), are divided by 8 in FP8, and the row's scale is
multiplied by 8. The kernel rounds scale · code to FP8.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dpq_core.checkpoint.exports import EXPORTS
from dpq_core.checkpoint.exports.compressed_tensors import vllm_obstacle
from dpq_core.checkpoint.exports.format import Target
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.quantize import quantize_layer
from dpq_core.recipe.scheme import PRESETS, Scheme

FP8 = ml_dtypes.float8_e4m3fn


def converted(scales):
    """Stored group scales [out, G] fp32 → group scales in FP8 (as fp32), row scales [out, 1]."""
    row = (scales.max(1, keepdims=True) / np.float32(448)).astype(np.float32)
    row = np.maximum(row, np.float32(1 / (448 * 512)))
    groups = np.clip(scales / row, -448, 448).astype(FP8).astype(np.float32)
    return (groups / 8).astype(FP8).astype(np.float32), row * 8


def quantized(**changes):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator)
    weight *= torch.logspace(-5, 1, 64)[:, None]  # rows below vLLM's smallest scale as well
    weight[7] = 0
    weight[9, 128:] *= 1e-3  # groups that differ by more than FP8 holds
    statistics = InputStatistics.empty(512)
    statistics.add_hessian(torch.randn(1024, 512, generator=generator))
    scheme = Scheme(preset="hopper-vllm", max_passes=1, **changes)
    return quantize_layer(weight.bfloat16(), statistics, scheme)


@pytest.mark.parametrize("search", ["minmax", "hessian"])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("method", ["dpq", "naive", "rtn"])
def test_codes_and_scales_go_through_vllms_conversion_unchanged(method, power_of_two, search):
    layer = quantized(method=method, power_of_two=power_of_two, scale_search=search)
    grid = layer.weight.grid
    target = Target("layer", 64, 512, layer.scheme, layer.scheme, torch.bfloat16)
    stored = EXPORTS["compressed-tensors"].tensors(layer, target, {})
    groups, rows = converted(stored["weight_scale"].float().numpy())
    assert (groups == grid.group_scale.float().numpy()).all()
    assert (rows == grid.channel_scale.numpy()).all()
    assert groups.max() <= 56
    words = stored["weight_packed"].numpy().astype(np.uint32)
    codes = ((words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15).reshape(64, 512)
    steps = codes.astype(np.float32) - 8
    served = (np.repeat(groups, 128, 1) * steps).astype(FP8).astype(np.float32) * rows
    assert (served == layer.decoded().numpy()).all()


def test_another_grid_does_not_go_through_unchanged():
    layer = quantized(group_scale="bf16")
    target = Target("layer", 64, 512, layer.scheme, layer.scheme, torch.bfloat16)
    stored = EXPORTS["compressed-tensors"].tensors(layer, target, {})
    groups, rows = converted(stored["weight_scale"].float().numpy())
    product = layer.weight.grid.group_scale.float() * layer.weight.grid.channel_scale
    assert np.abs(groups * rows / product.numpy() - 1).max() > 0.01


def test_row_scales_between_powers_of_two_lose_less():
    assert quantized().report.error < 0.9 * quantized(power_of_two=True).report.error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"preset": "hopper"},
            "preset 'hopper' is unknown: there are hopper-vllm, ada-vllm, gaudi-inc",
        ),
        ({"preset": "hopper-vllm", "symmetric": False}, "group_scale e4m3 needs symmetric: True"),
        ({"preset": "hopper-vllm", "fp8_max": 240}, "needs fp8_max: 448, but it is 240"),
        ({"preset": "hopper-vllm", "channel_scale": "tensor"}, "needs channel_scale: row"),
        ({"preset": "hopper-vllm", "inner": "int8"}, "needs inner: e4m3, but it is int8"),
    ],
)
def test_presets_that_contradict_themselves_are_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        Scheme(**changes)


def test_a_preset_stands_for_fields_and_yields_to_those_beside_it():
    scheme = Scheme(preset="hopper-vllm", group_size=64)
    assert scheme == Scheme(**PRESETS["hopper-vllm"] | {"group_size": 64})
    assert Scheme.model_validate(scheme.model_dump()) == scheme


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"bits": 8}, None),
        ({"group_size": 64}, "groups of 128"),
        ({"activations": "static"}, "a scale a token"),
        ({"features": 192}, "multiples of 128"),
        ({"other": {"bits": 8}}, "fuses layers.0.k_proj with layers of another scheme"),
    ],
)
def test_what_vllm_has_kernels_for(changes, said):
    changes = dict(changes)
    other, features = changes.pop("other", {}), changes.pop("features", 256)
    scheme = Scheme(preset="hopper-vllm", **changes)
    second = Scheme(preset="hopper-vllm", **changes | other)
    targets = [
        Target(f"layers.0.{name}", 128, features, each, scheme, torch.bfloat16)
        for name, each in (("q_proj", scheme), ("k_proj", second))
    ]
    obstacle = vllm_obstacle(targets)
    assert obstacle is None if said is None else said in obstacle
