"""`preset: ada-vllm`: what is judged is what Marlin computes with FP8 inputs."""

import pytest
import torch
from pydantic import ValidationError

from dpq_core.calibration.statistics import InputRounding
from dpq_core.checkpoint.exports.compressed_tensors import vllm_obstacle
from dpq_core.checkpoint.exports.format import Target
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import quantize_layer
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.layer_choices import chosen_scheme
from dpq_core.recipe.scheme import Scheme
from dpq_core.serving import weights
from dpq_core.serving.runtimes import other_arithmetic

ROWS, COLUMNS = 48, 256


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, COLUMNS, generator=generator)
    statistics = InputStatistics.empty(COLUMNS)
    statistics.add_hessian(x)
    statistics.add_magnitudes(x)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) / 20
    return quantize_layer(weight, statistics, Scheme(preset="ada-vllm"))


def marlin(layer, x):
    """Its sums: E4M3 inputs times the codes less eight, a group's sum times its scale. Float64."""
    grid, codes = layer.weight.grid, layer.weight.codes
    scale = (x.abs().amax(1, keepdim=True).float() / 448).double()
    x8 = (x.float() / scale.float()).to(torch.float8_e4m3fn).double()
    products = x8.unflatten(1, (-1, 128)).unsqueeze(1) * (codes.double() - 8).unflatten(
        1, (-1, 128)
    )
    return (products.sum(3) * grid.group_scale.double()).sum(2) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_arithmetic_is_marlins(layer, dtype):
    x = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, found = marlin(layer, x), W4A8Linear(layer, None)(x)
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    assert torch.allclose(found.double(), expected, rtol=rounding, atol=1e-6)


def test_a_weight_rounded_to_16_bits_would_be_another(layer):
    x = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(1))
    linear = W4A8Linear(layer, None)
    linear.weight8 = linear.weight8.bfloat16()
    assert not torch.allclose(linear(x).double(), marlin(layer, x), rtol=1e-6, atol=1e-6)


def test_scales_are_numbers_of_the_models_type(layer):
    """Nothing is left for vLLM to round when it loads them."""
    assert layer.weight.grid.group_scale.dtype == torch.bfloat16
    assert (layer.weight.grid.channel_scale == 1).all()
    assert (layer.weight.grid.zero_point == 8).all()


def test_hessians_are_of_the_inputs_that_it_multiplies():
    section = CalibrationSection(dataset=TextDataset(path="none"))
    rounding = InputRounding.of(Scheme(preset="ada-vllm"), section)
    assert (rounding.inner.name, rounding.static) == ("e4m3", False)
    w4a16 = Scheme(method="gptq", inner="none", activations="none")
    assert InputRounding.of(w4a16, section) is None


def test_our_kernels_leave_it_to_the_definition(layer):
    assert "not rounded to E4M3" in other_arithmetic(layer, "kernel")
    assert "not rounded to E4M3" in weights.refusal(layer)


def test_static_scales_want_an_inner_format():
    with pytest.raises(ValidationError, match="'static' but inner is 'none'"):
        Scheme(preset="ada-vllm", activations="static")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"group_size": 256}, "groups of 32, 64 or 128"), ({"symmetric": False}, "not symmetric")],
)
def test_what_marlin_does_not_take_is_said(changes, said):
    fitting, other = Scheme(preset="ada-vllm"), Scheme(preset="ada-vllm", **changes)
    assert vllm_obstacle([target(fitting)]) is None
    assert said in vllm_obstacle([target(other)])


def target(scheme, name="a.down_proj"):
    return Target(name, 640, 640, scheme, scheme, torch.bfloat16)


def test_beside_it_are_fp8_weights():
    base = Scheme(preset="ada-vllm")
    eight = chosen_scheme(base, "w8a8")
    assert (eight.bits, eight.inner, eight.activations) == (8, "e4m3", "dynamic")
    assert vllm_obstacle([target(base), target(eight, "a.o_proj")]) is None
    wide = chosen_scheme(base, "w8a16")
    assert "choose w8a8" in vllm_obstacle([target(base), target(wide, "a.o_proj")])
    assert vllm_obstacle([target(wide)]) is None
