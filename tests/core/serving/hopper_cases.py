"""The Hopper kernels, launched: on a Hopper GPU, or, with TRITON_INTERPRET=1, in the interpreter.

    python -m pytest tests/core/serving/hopper_cases.py

`test_hopper.py` runs this in a process of its own, for the interpreter is chosen when Triton is
imported.
"""

import os
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from dpq_core.arithmetic.formats import round_to
from dpq_core.layer.grid import Grid, choose_grid
from dpq_core.layer.input_scale import token_scale
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import round_weight
from dpq_core.layer.records import LayerReport, QuantizedLinear, QuantizedWeight, RoundedWeight
from dpq_core.recipe.scheme import Scheme
from dpq_core.serving import hopper
from dpq_core.serving.hopper_packing import pack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import triton_interpreter

    triton_interpreter.correct()

REPORT = LayerReport(error=float("nan"), damp_frac=float("nan"), codes_moved=0)


@pytest.fixture(scope="module")
def device():
    if INTERPRETED:
        return torch.device("cpu")
    if reason := hopper.unavailable():
        pytest.skip(reason)
    return torch.device("cuda")


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(rows, features, device, **changes):
    """A layer of random codes on the grid of a random weight."""
    scheme = Scheme(method="rtn", rounding="nearest", **changes)
    weight = normal(rows, features, seed=0) / 20
    weight[0] = 0
    scale = torch.tensor(0.01, device=device) if scheme.activations == "static" else None
    if scheme.bits == 8:
        rounded = round_weight(weight, scheme)
        stored = RoundedWeight(rounded.values.to(device), rounded.channel_scale.to(device))
        return QuantizedLinear(scheme, stored, scale, REPORT)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(16, (rows, features), generator=generator, dtype=torch.uint8)
    grid = choose_grid(weight, scheme, None)
    stored = QuantizedWeight(codes.to(device), grid.to(device))
    return QuantizedLinear(scheme, stored, scale, REPORT)


def exact(x, reference):
    """The formula in float64, of the definition's rounded operands."""
    scale = torch.ones(1, 1, device=x.device)
    x8 = x.float()
    if reference.inner is not None:
        static = reference.input_scale
        scale = token_scale(x, reference.inner.maximum) if static is None else static
        x8 = round_to(x8 / scale, reference.inner)
    y = x8.double() @ reference.weight8.double().T * reference.channel_scale.double() * scale
    return y if reference.bias is None else y + reference.bias.double()


def assert_as_good(layer, tokens, bias, device):
    """The kernels' error is at most twice the definition's; where the library multiplies, on a GPU,
    three times: an H100 showed 2.6 (docs/log.md)."""
    features = layer.features
    x = (2 * normal(tokens, features, seed=2)).bfloat16().to(device)
    x[0, : features // 2] *= 100  # beyond a static range
    x[-1] = 0
    reference = W4A8Linear(layer, bias)
    module = hopper.make(layer, bias)
    y, expected = module(x), exact(x, reference)
    assert y.dtype == torch.bfloat16
    assert y.shape == expected.shape
    defined = reference(x.clone().requires_grad_()).detach()  # in plain torch, on a CPU too
    error, allowed = ((z.double() - expected).abs().amax(1) for z in (y, defined))
    times = 2 if INTERPRETED or tokens <= hopper.FEW_TOKENS else 3
    assert (error <= times * allowed).all()  # of each token
    assert torch.equal(module(x), y)  # and what programs share is as it was


SHAPES = [  # out, in, tokens
    (128, 256, 1),  # one block, one token
    (200, 600, 3),  # tails of rows, columns, groups and tokens
    (136, 1536, 17),  # columns shared by programs
    (8, 520, 64),
    (300, 264, 128),  # the last that are decoded as they are multiplied
    (200, 600, 129),  # the first that are dequantized
    (48, 328, 4096),
]


@pytest.mark.parametrize(("out", "features", "tokens"), SHAPES)
def test_w4a8_is_as_good_as_the_definition(out, features, tokens, device):
    layer = quantized(out, features, device)
    bias = normal(out, seed=3).bfloat16().to(device)
    assert_as_good(layer, tokens, bias, device)


@pytest.mark.parametrize("tokens", [2, 130])
@pytest.mark.parametrize(
    "changes",
    [
        {"activations": "dynamic"},
        {"symmetric": True, "group_scale": "e4m3", "activations": "dynamic"},
        {"group_size": 32},
        {"group_size": 64, "fp8_max": 240},
        {"group_size": 96, "symmetric": True},
        {"group_size": 256, "channel_scale": "tensor", "power_of_two": True, "fp8_max": 240},
        {"bits": 8},
        {"bits": 8, "fp8_max": 240, "activations": "dynamic"},
        {"inner": "none", "activations": "none"},
        {"inner": "none", "activations": "none", "group_size": 32},
        {"inner": "none", "activations": "none", "group_size": 64},
    ],
    ids=str,
)
def test_other_schemes_are_as_good_as_the_definition(changes, tokens, device):
    assert_as_good(quantized(200, 600, device, **changes), tokens, None, device)


@pytest.mark.parametrize(("out", "features", "tokens"), SHAPES[::2])
def test_w4a16_is_as_good_as_the_definition(out, features, tokens, device):
    layer = quantized(out, features, device, inner="none", activations="none", symmetric=True)
    assert_as_good(layer, tokens, normal(out, seed=3).bfloat16().to(device), device)


def decoded(weight, device):
    """What the kernel decodes of a weight of whole blocks."""
    packed = pack(weight)
    rows, columns = weight.codes.shape
    fp8 = weight.grid.inner is not None
    kind = torch.float8_e4m3fn if fp8 else torch.bfloat16
    values = torch.empty(rows, columns, dtype=kind, device=device)
    kernels = hopper._kernels()
    kernels.dequantize[columns // 256, len(packed.words)](
        values, packed.words, packed.scales, packed.zeros, rows, columns // 256,
        GROUPS=packed.groups, ZEROS=packed.zeros is not None, FP8=fp8, LIMIT=packed.limit,
        num_warps=kernels.WARPS,
    )  # fmt: skip
    return values


def every_grid(inner, exponents, device):
    """All codes at all zero points, at all mantissas of scales."""
    mantissas = 1 + torch.arange(128).float() / 128
    scales = (mantissas[:, None] * 2.0 ** torch.tensor(exponents)).flatten()
    group_scale = scales.repeat_interleave(16).view(-1, 8).bfloat16()
    zero_point = torch.arange(16, dtype=torch.uint8).repeat(len(scales)).view(-1, 8)
    codes = torch.arange(256, dtype=torch.uint8).remainder(16).expand(len(group_scale), 256)
    ones = torch.ones(len(group_scale), 1)
    fmt = Scheme(inner=inner, activations="none", method="rtn").inner_format
    grid = Grid(ones, group_scale, zero_point, group_size=32, inner=fmt)
    return QuantizedWeight(codes.contiguous().to(device), grid.to(device))


def test_every_code_zero_point_and_scale_decodes_to_the_bit(device):
    weight = every_grid("e4m3", [-40, *range(-14, 7), 14], device)  # E4M3's range and beyond
    expected = weight.grid.decode8(weight.codes).to(torch.float8_e4m3fn)
    assert torch.equal(decoded(weight, device).view(torch.uint8), expected.view(torch.uint8))


def test_every_code_decodes_to_the_bit_in_16_bits(device):
    weight = every_grid("none", [-40, -7, 14], device)
    expected = weight.grid.decode8(weight.codes).bfloat16()
    assert torch.equal(decoded(weight, device).view(torch.int16), expected.view(torch.int16))


def test_what_reaches_beyond_240_saturates_there(device):
    weight = every_grid("e4m3", [-6, 0, 3, 4, 5, 6], device)
    grid = replace(weight.grid, inner=Scheme(fp8_max=240).inner_format)
    expected = grid.decode8(weight.codes)
    assert expected.max() == 240
    assert torch.equal(decoded(QuantizedWeight(weight.codes, grid), device).float(), expected)


@pytest.mark.parametrize("maximum", [240, 448])
def test_inputs_are_rounded_as_the_definition_rounds(maximum, device):
    """All of BF16 but its NaNs, by static scales and by a token's own."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[x.isfinite()][: 254 * 256].view(-1, 256).to(device)
    fmt = Scheme(fp8_max=maximum).inner_format
    for scale in (torch.tensor(0.37), torch.tensor(1.0), None):
        scale = None if scale is None else scale.to(device)
        x8, scales = hopper._quantized(x, 512, scale, float(maximum))
        expected = token_scale(x, maximum) if scale is None else scale.expand(len(x), 1)
        assert torch.equal(scales[:, None], expected)
        assert torch.equal(x8[:, :256].float(), round_to(x.float() / expected, fmt))
        assert not x8[:, 256:].float().any()


def test_nan_reaches_the_output(device):
    layer = quantized(64, 256, device)
    x = torch.zeros(2, 256, dtype=torch.bfloat16, device=device)
    x[1, 5] = float("nan")
    y = hopper.make(layer, None)(x)
    assert not y[0].any()
    assert y[1, 1:].isnan().all()


@pytest.mark.parametrize("tokens", [0, 1, 130])
@pytest.mark.parametrize("bits", [4, 8])
def test_operators_are_what_they_say(bits, tokens, device):
    """Schema, fake tensors: what `torch.compile` needs."""
    layer = quantized(64, 600, device, bits=bits)
    module = hopper.make(layer, None)
    x = normal(tokens, 600, seed=2).bfloat16().to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    if bits == 4:
        arguments = (
            x, module.words, module.scales, module.zeros, module.channel_scale,
            module.input_scale, None, module.arrived, 64, module.groups, module.limit,
            module.maximum,
        )  # fmt: skip
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(hopper.four_bits, arguments, test_utils=tests)


@pytest.mark.skipif(not INTERPRETED, reason="of Triton's interpreter")
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "bfloat16"])
def test_conversions_of_the_interpreter_are_the_hardwares(kind):
    """FP32 over all exponents, with all ties, against ml_dtypes; saturating in E4M3."""
    import triton.language as tl

    values = (np.arange(1 << 15, dtype=np.uint32) << 16).view(np.float32)
    values = values[np.isfinite(values)]
    values = np.concatenate([values, np.nextafter(values, 0), np.nextafter(values, np.inf)])
    target = tl.float8e4nv if kind == "float8_e4m3fn" else tl.bfloat16
    limited = np.minimum(values, 448) if target is tl.float8e4nv else values
    expected = limited.astype(getattr(ml_dtypes, kind))
    found = triton_interpreter._convert(values, tl.float32, target, None)
    assert (found == expected.view(found.dtype)).all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA graphs")
@pytest.mark.parametrize("tokens", [1, 16, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_cuda_graph_replays_the_linear(bits, tokens, device):
    module = hopper.make(quantized(1024, 4096, device, bits=bits), None)
    x = normal(tokens, 4096, seed=2).bfloat16().to(device)
    module(x)  # compiles the kernels
    graph, static = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y = module(static)
    for seed in (3, 4):
        static.copy_(normal(tokens, 4096, seed=seed).bfloat16())
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, module(static))
