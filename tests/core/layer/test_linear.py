"""W4A8Linear against DESIGN's formula in float64, and the tensors of a layer in storage."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpq_core.arithmetic.formats import FORMATS, round_to
from dpq_core.kernels import blas, cpu, forward_rows
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.input_scale import token_scale
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import quantize_layer
from dpq_core.layer.records import LayerReport, QuantizedLinear, QuantizedWeight, RoundedWeight
from dpq_core.layer.storage import expected_shapes, layer_from_tensors, layer_tensors, stored_bytes
from dpq_core.recipe.scheme import Scheme

ROWS, FEATURES = 24, 40  # with groups of 16, a short last one
SAFETENSORS_TYPES = {
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.float32: "F32",
}


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def quantized(scheme):
    x = normal(300, FEATURES, seed=1) @ normal(FEATURES, FEATURES, seed=2)
    statistics = InputStatistics.empty(FEATURES)
    statistics.add_hessian(x)
    statistics.add_magnitudes(x)
    weight = (normal(ROWS, FEATURES, seed=0) / 20).bfloat16()
    return quantize_layer(weight, statistics, scheme)


def inner_round(values, scheme):
    limit = 127 if scheme.inner == "int8" else scheme.fp8_max
    clipped = np.clip(values, -limit, limit)
    if scheme.inner == "int8":
        return np.rint(clipped)
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def emulated(x, layer, bias, scheme):
    """y = s8 · sx · (x8 · Ŵ8ᵀ) + bias. Scales and quotients in fp32, which defines what is
    rounded; products and sums in float64."""
    limit = np.float32(127 if scheme.inner == "int8" else scheme.fp8_max)
    x = x.float().numpy()
    if scheme.activations == "none":
        x8, sx = x.astype(np.float64), 1.0
    else:
        if scheme.activations == "static":
            sx = layer.input_scale.numpy()
        else:
            amax = np.abs(x).max(-1, keepdims=True)
            sx = np.where(amax > 0, amax / limit, np.float32(1))
        x8 = inner_round(x / sx, scheme)
    if isinstance(layer.weight, QuantizedWeight):
        grid = layer.weight.grid
        columns = np.arange(FEATURES) // scheme.group_size
        scale = grid.group_scale.float().numpy()[:, columns].astype(np.float64)
        steps = layer.weight.codes.numpy() - grid.zero_point.numpy()[:, columns].astype(np.float64)
        w8, s8 = inner_round(scale * steps, scheme), grid.channel_scale.numpy().T
    elif isinstance(layer.weight, RoundedWeight):
        w8, s8 = layer.weight.values.double().numpy(), layer.weight.channel_scale.numpy().T
    else:
        w8, s8 = layer.weight.double().numpy(), 1.0
    y = s8.astype(np.float64) * sx * (x8 @ w8.T) if np.ndim(s8) else sx * (x8 @ w8.T)
    return y if bias is None else y + bias.double().numpy()


def assert_is_the_formula(scheme, with_bias, dtype):
    layer = quantized(scheme)
    bias = normal(ROWS, seed=3).to(dtype) if with_bias else None
    x = (2 * normal(2, 5, FEATURES, seed=4)).to(dtype)
    x[0, 0] *= 100  # beyond the calibrated range: saturates where the scale is static
    expected = torch.from_numpy(emulated(x, layer, bias, scheme))
    y = W4A8Linear(layer, bias)(x)
    assert y.dtype == dtype
    assert y.shape == (2, 5, ROWS)
    # Half an ulp of BF16 is 2**-9; sums of 40 products in FP32 may cancel.
    rtol = 2**-8 if dtype == torch.bfloat16 else 2e-6
    atol = expected.abs().amax((1, 2), keepdim=True).expand_as(expected) * 2e-6
    assert ((y.double() - expected).abs() <= rtol * expected.abs() + atol).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
@pytest.mark.parametrize(("inner", "fp8_max"), [("e4m3", 448), ("e4m3", 240), ("int8", 448)])
def test_forward_is_the_formula(inner, fp8_max, activations, with_bias, dtype):
    scheme = Scheme(inner=inner, fp8_max=fp8_max, activations=activations, group_size=16)
    assert_is_the_formula(scheme, with_bias, dtype)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "none"},
        {"symmetric": True},
        {"power_of_two": True},
        {"bits": 8},
        {"bits": 8, "fp8_max": 240, "channel_scale": "tensor"},
        {"bits": 8, "inner": "int8", "power_of_two": True},
    ],
    ids=str,
)
def test_forward_of_other_schemes_is_the_formula(changes, activations):
    scheme = Scheme(activations=activations, group_size=16, **changes)
    assert_is_the_formula(scheme, with_bias=True, dtype=torch.float32)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_16_bit_arithmetic_is_an_ordinary_linear(method):
    scheme = Scheme(method=method, inner="none", activations="none", group_size=16)
    layer, x = quantized(scheme), normal(5, FEATURES, seed=4).bfloat16()
    weight = layer.decoded().bfloat16()
    y = W4A8Linear(layer, None)(x)
    assert torch.equal(y, torch.nn.functional.linear(x, weight))


class Products(TorchDispatchMode):
    """The types of what was multiplied, and of the sums."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        y = function(*arguments, **(named or {}))
        if "mm" in str(function):
            self.found.append((arguments[0].dtype, arguments[1].dtype, y.dtype))
        return y


@pytest.mark.parametrize(
    ("activations", "dtype", "operands"),
    [
        ("static", torch.bfloat16, torch.bfloat16),
        ("dynamic", torch.float32, torch.bfloat16),
        ("none", torch.bfloat16, torch.bfloat16),
        ("none", torch.float32, torch.float32),
    ],
)
def test_a_gpu_multiplies_bf16_operands_with_fp32_sums(activations, dtype, operands):
    """By types and shapes alone: no GPU is here, so no number is."""
    layer = quantized(Scheme(activations=activations, group_size=16))
    linear = W4A8Linear(layer, None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, tensor in list(linear.named_buffers()):
            setattr(linear, name, torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))
        x = torch.empty(2, 5, FEATURES, dtype=dtype, device="cuda")
        with Products() as products:
            y = linear(x)
    assert products.found == [(operands, operands, torch.float32)]
    assert (y.shape, y.dtype) == ((2, 5, ROWS), dtype)


@pytest.mark.parametrize("inner", ["e4m3", "int8"])
def test_token_of_zeros(inner):
    scheme = Scheme(inner=inner, activations="dynamic", group_size=16)
    bias = normal(ROWS, seed=3)
    x = normal(3, FEATURES, seed=4)
    x[1] = 0
    y = W4A8Linear(quantized(scheme), bias)(x)
    assert y.isfinite().all()
    assert torch.equal(y[1], bias)
    assert token_scale(x, 448.0).flatten()[1] == 1


def test_dynamic_tokens_do_not_see_each_other():
    scheme = Scheme(activations="dynamic", group_size=16)
    module, x = W4A8Linear(quantized(scheme), None), normal(3, FEATURES, seed=4)
    alone = module(x)[0]
    x[1:] *= 1000
    assert torch.equal(module(x)[0], alone)


fused = pytest.mark.skipif(blas.bf16_product is None, reason="this torch comes without MKL")
EVERY_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
INNER = {"e4m3": ("e4m3", 448), "e4m3_240": ("e4m3", 240), "int8": ("int8", 448)}


def of_weight(weight, bias=None, input_scale=1.0, **changes):
    """A module of a 16-bit weight, as a layer whose activations alone are rounded."""
    scheme = Scheme(method="none", **changes)
    report = LayerReport(0, 0, 0)
    layer = QuantizedLinear(scheme, weight.bfloat16(), torch.tensor(input_scale), report)
    return W4A8Linear(layer, bias)


def both_ways(module, x, monkeypatch):
    """The fused pass, and the plain torch that defines it."""
    y = module(x)
    with monkeypatch.context() as patch:
        patch.setattr(forward_rows, "fits", lambda *_: False)
        return y, module(x)


def exact_sums(rows, with_bias, **changes):
    """Small whole numbers, whose sums are exact in any order, and channel scales; x is [rows, 80].

    Some values of x saturate, or are rounded."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-7, 8, (48, 80), generator=generator)
    x = torch.randint(-40, 41, (rows, 80), generator=generator).bfloat16()
    x[1::7] *= 16
    bias = normal(48, seed=3).bfloat16() if with_bias else None
    module = of_weight(weight, bias, **changes)
    module.channel_scale = torch.rand(48, generator=generator)
    return module, x


@fused
@pytest.mark.parametrize("scale", [1.0, 0.3, 7.7e-3, 2.0**-9, 1e30, 3e-39])
@pytest.mark.parametrize("name", INNER)
def test_fused_pass_rounds_every_bf16_input(name, scale):
    inner, fp8_max = INNER[name]
    finite = torch.where(EVERY_BF16.isfinite(), EVERY_BF16, 0).view(-1, 64)
    module = of_weight(torch.eye(64), None, scale, inner=inner, fp8_max=fp8_max)
    x8 = round_to(finite.float() / torch.tensor(scale), FORMATS[name])
    assert torch.equal(module(finite), (x8 * torch.tensor(scale)).bfloat16())


@fused
@pytest.mark.parametrize("name", INNER)
def test_rounding_of_the_fused_pass_keeps_nan_and_the_sign_of_zero(name):
    x = EVERY_BF16.view(-1, 64)
    x8 = cpu.quantize(x, torch.tensor(0.3), FORMATS[name]).float()
    expected = round_to(x.float() / torch.tensor(0.3), FORMATS[name])
    assert torch.equal(x8.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(x8[number], expected[number])
    assert torch.equal(x8.signbit()[number], expected.signbit()[number])


@fused
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
@pytest.mark.parametrize("inner", ["e4m3", "int8"])
@pytest.mark.parametrize("rows", [1, 2, 63, 700])
def test_fused_pass_is_the_definition(rows, inner, activations, with_bias, monkeypatch):
    changes = {"inner": inner, "activations": activations}
    if activations == "static":
        changes["input_scale"] = 0.25
    module, x = exact_sums(rows, with_bias, **changes)
    if activations == "dynamic":
        module.input_scale = None
        x[:, 0] = 448 if inner == "e4m3" else 127  # scales of one: the sums stay exact
        x.clamp_(-127, 127) if inner == "int8" else x.clamp_(-448, 448)
    y, defined = both_ways(module, x, monkeypatch)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, defined)


@fused
def test_fused_pass_takes_any_shape_and_stride(monkeypatch):
    module, x = exact_sums(120, with_bias=True)
    for view in (
        x[0],
        x.view(4, 30, 80),
        x.view(4, 30, 80).transpose(0, 1),
        x[::3],
        x.flip(1).T.contiguous().T,
        x[:0],
    ):
        y, defined = both_ways(module, view, monkeypatch)
        assert y.shape == (*view.shape[:-1], 48)
        assert torch.equal(y, defined)


@fused
def test_fused_pass_saturates_infinity_and_spreads_nan_over_its_own_token(monkeypatch):
    module, x = exact_sums(10, with_bias=False)
    x[3, 5], x[4, 6], x[7, 0] = torch.inf, -torch.inf, torch.nan
    y, defined = both_ways(module, x, monkeypatch)
    assert y[7].isnan().all()
    others = torch.arange(10) != 7
    assert y[others].isfinite().all()
    assert torch.equal(y[others], defined[others])


@fused
def test_fused_pass_depends_on_neither_batch_nor_threads():
    scheme = Scheme(group_size=16)
    module = W4A8Linear(quantized(scheme), None)
    x = normal(1000, FEATURES, seed=4).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y = module(x)
        torch.set_num_threads(2)
        assert torch.equal(module(x), y)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for first, last in ((0, 2), (5, 70), (300, 999)):
        assert torch.equal(module(x[first:last]), y[first:last])


@fused
def test_fused_pass_in_many_threads_at_once():
    module, x = exact_sums(500, with_bias=True)
    y = module(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(other, y) for other in pool.map(module, [x] * 20))


SCHEMES = [
    Scheme(method=method, inner=inner, activations=activations, symmetric=symmetric, group_size=16)
    for method, inner, activations, symmetric in itertools.product(
        ("none", "rtn", "gptq", "naive", "dpq"),
        ("e4m3", "int8", "none"),
        ("static", "dynamic", "none"),
        (False, True),
    )
    if (method != "gptq" or inner == "none")
    and (method not in ("naive", "dpq") or inner != "none")
    and (inner != "none" or activations == "none")
]


EIGHT_BITS = [Scheme(bits=8, inner=inner, group_size=16) for inner in ("e4m3", "int8")]


@pytest.mark.parametrize(
    "scheme",
    [*SCHEMES, *EIGHT_BITS],
    ids=lambda s: f"{s.method}-{s.bits}-{s.inner}-{s.activations}{'-symmetric' * s.symmetric}",
)
def test_layer_tensors_round_trip(scheme):
    layer = quantized(scheme.model_copy(update={"rounding": "nearest"}))
    tensors = layer_tensors(layer)
    stored = {name: (list(t.shape), SAFETENSORS_TYPES[t.dtype]) for name, t in tensors.items()}
    assert stored == expected_shapes(ROWS, FEATURES, scheme)
    assert sum(t.nbytes for t in tensors.values()) == stored_bytes(ROWS, FEATURES, scheme)
    again = layer_from_tensors(tensors, FEATURES, scheme)
    assert torch.equal(again.decoded(), layer.decoded())
    for name, tensor in layer_tensors(again).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.float(), tensors[name].float())
    x = normal(4, FEATURES, seed=4)
    assert torch.equal(
        W4A8Linear(again, None)(x),
        W4A8Linear(layer, None)(x),
    )


@pytest.mark.parametrize("scheme", EIGHT_BITS, ids=lambda s: s.inner)
def test_eight_bits_are_the_nearest_of_the_row(scheme):
    layer = quantized(scheme)
    weight = (normal(ROWS, FEATURES, seed=0) / 20).bfloat16().float().numpy()
    limit = np.float32(127 if scheme.inner == "int8" else 448)
    scale = np.abs(weight).max(1, keepdims=True) / limit
    assert torch.equal(layer.weight.channel_scale, torch.from_numpy(scale))
    expected = scale * inner_round(weight / scale, scheme)
    assert np.allclose(layer.decoded().numpy(), expected, rtol=1e-6, atol=0)
    assert 0 < layer.report.error < 1e-3


def test_missing_tensor_is_named():
    scheme = Scheme(group_size=16)
    tensors = layer_tensors(quantized(scheme))
    del tensors["group_scale"]
    with pytest.raises(KeyError, match="group_scale"):
        layer_from_tensors(tensors, FEATURES, scheme)


@pytest.fixture
def bf16_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_being_loaded_by_another_thread_changes_nothing(bits, request):
    """transformers sets the default dtype of the whole process for as long as it builds a model."""
    scheme = Scheme(group_size=16, bits=bits)
    x = normal(7, FEATURES, seed=3).bfloat16()

    def everything():
        layer = quantized(scheme)
        return *layer_tensors(layer).values(), W4A8Linear(layer, None)(x), layer.decoded()

    expected = everything()
    request.getfixturevalue("bf16_default")
    torch.testing.assert_close(everything(), expected, rtol=0, atol=0)
