"""The CPU runtimes, for AMX and for AVX2, against the definition, `W4A8Linear`."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from dpq_core.kernels import products
from dpq_core.layer.grid import Grid
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import quantize_layer
from dpq_core.layer.records import LayerReport, QuantizedLinear, QuantizedWeight
from dpq_core.recipe.scheme import Scheme
from dpq_core.serving import avx2, cpu
from dpq_core.serving.avx2_weights import group_tables
from dpq_core.serving.runtimes import RUNTIMES, Chosen, RuntimeUnavailableError, runtime_for


def _row(name: str, module: Any) -> Any:
    missing = module.unavailable()
    return pytest.param(module, id=name, marks=pytest.mark.skipif(bool(missing), reason=missing))


needs_avx2 = pytest.mark.skipif(bool(avx2.unavailable()), reason=avx2.unavailable() or "-")
here = pytest.mark.parametrize("runtime", [_row("amx", cpu), _row("avx2", avx2)])

W8A8: dict[str, Any] = {"bits": 8}
W4A16: dict[str, Any] = {"inner": "none", "activations": "none"}
SCHEMES: dict[str, dict[str, Any]] = {
    "w4a8": {},
    "dynamic": {"activations": "dynamic"},
    "symmetric": {"symmetric": True},
    "240": {"fp8_max": 240, "channel_scale": "tensor", "power_of_two": True},
    "g32": {"group_size": 32},
    "g64": {"group_size": 64},
    "g256": {"group_size": 256},
    "int8 inside": {"inner": "int8", "activations": "dynamic"},
    "w4e4m3a16": {"activations": "none"},
    "w4a16": W4A16,
    "w8a8": W8A8,
    "w8a8-int8": {"bits": 8, "inner": "int8", "activations": "dynamic"},
}
SHAPES = [  # tokens, out, in: the last of each has tails
    (1, 64, 256),
    (16, 32, 512),
    (64, 48, 1024),
    (3, 33, 200),
    (70, 17, 1111),
    (4096, 16, 128),
]


def layer_of(rows: int, features: int, **scheme: Any) -> tuple[QuantizedLinear, Tensor]:
    """A rounded layer of random weights, and inputs [4096, in] with tokens of many magnitudes."""
    generator = torch.Generator().manual_seed(rows * features)
    weight = torch.randn(rows, features, generator=generator) * 0.02
    x = torch.randn(4096, features, generator=generator)
    x *= torch.logspace(-3, 1, 4096)[:, None]
    statistics = InputStatistics.empty(features)
    statistics.add_magnitudes(x)
    statistics.add_hessian(x)
    made = Scheme.model_validate({"method": "rtn", "rounding": "nearest", **scheme})
    return quantize_layer(weight, statistics, made), x.to(torch.bfloat16)


@here
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_its_error_is_at_most_twice_the_definitions(
    runtime: Any, scheme: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    tokens, rows, features = shape
    layer, inputs = layer_of(rows, features, **scheme)
    x = inputs[torch.linspace(0, len(inputs) - 1, tokens).long()]
    bias = torch.randn(rows).to(torch.bfloat16) if rows % 2 else None
    definition = W4A8Linear(layer, bias)
    exact = _exact(definition, x)
    found, expected = runtime.make(layer, bias)(x), definition(x)
    scale = exact.abs().amax(1, keepdim=True)  # of each token
    error, allowed = ((y.double() - exact).abs() / scale for y in (found, expected))
    assert error.max() <= 2 * allowed.max()
    assert (found == expected).float().mean() > 0.99  # sums in another order, seldom another BF16


def _exact(definition: W4A8Linear, x: Tensor) -> Tensor:
    """Of the same operands in float64."""
    from dpq_core.arithmetic.formats import round_to

    scale = definition._input_scale(x)
    x8 = x.double()
    if scale is not None and definition.inner is not None:
        x8 = round_to(x.float() / scale, definition.inner).double()
    y = x8 @ definition.weight8.double().T * definition.channel_scale.double()
    y = y if scale is None else y * scale.double()
    return y if definition.bias is None else y + definition.bias.double()


@here
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_batches_give_the_same_bits(runtime: Any, threads: int) -> None:
    layer, x = layer_of(80, 384)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        module = runtime.make(layer, None)
        whole = module(x[:200].view(2, 100, 384))
    finally:
        torch.set_num_threads(before)
    assert whole.shape == (2, 100, 80)
    tokens = torch.cat([module(each) for each in x[:200].split(64)])
    assert torch.equal(whole.view(200, 80), tokens)


@here
def test_every_code_on_every_grid_is_decoded_as_the_definition_does(runtime: Any) -> None:
    """An input that is a unit vector reads one column of the weight."""
    layer, _ = layer_of(16, 128, activations="none")
    identity = torch.eye(128, dtype=torch.bfloat16)
    for scale in torch.logspace(-9, 4, 27, base=2):
        for zero_point in (0, 7, 15):
            grid = layer.weight.grid  # type: ignore[union-attr]
            grid.group_scale.fill_(float(scale))
            grid.zero_point.fill_(zero_point)
            if runtime.refusal(layer):
                continue
            codes = layer.weight.codes  # type: ignore[union-attr]
            codes.copy_(torch.arange(128).expand(16, 128) % 16)
            found = runtime.make(layer, None)(identity).float().T
            assert torch.equal(found, W4A8Linear(layer, None)(identity).float().T)


@here
def test_nan_stays_and_the_infinite_saturates(runtime: Any) -> None:
    layer, x = layer_of(16, 128, activations="dynamic")
    x = x[:3].clone()
    x[0, 5], x[1, 5] = torch.nan, torch.inf
    found, expected = runtime.make(layer, None)(x), W4A8Linear(layer, None)(x)
    assert found[0].isnan().all()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[2], expected[2])


@here
def test_inputs_that_are_not_bf16_are_refused(runtime: Any) -> None:
    layer, x = layer_of(16, 128)
    with pytest.raises(TypeError, match=r"takes BF16 inputs, not torch\.float32"):
        runtime.make(layer, None)(x.float())


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ({"method": "none", "inner": "none", "activations": "none"}, "kept in 16 bits"),
        ({"group_size": 16}, "groups of 16: kernels take 32, 64 and multiples of 128"),
        ({"group_size": 96}, "groups of 96: kernels take 32, 64 and multiples of 128"),
    ],
)
def test_what_has_no_kernel_is_computed_by_the_definition_and_named(
    scheme: dict[str, Any], said: str
) -> None:
    layer, _ = layer_of(16, 192, **scheme)
    chosen = Chosen(RUNTIMES["cpu"])
    assert isinstance(chosen(layer, None), W4A8Linear)
    assert chosen.refused == {said: 1}


def test_codes_beyond_the_formats_range_are_refused() -> None:
    layer, _ = layer_of(16, 128)
    layer.weight.grid.group_scale.fill_(64)  # type: ignore[union-attr]
    assert cpu.refusal(layer) == "codes that stand for more than 448"


@functools.cache
def _wide_layer() -> tuple[QuantizedLinear, Tensor]:
    """Random codes [300, 5000], and inputs [515, 5000]."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (300, 5000), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(300, 40, generator=generator) * 20 + 10).bfloat16()
    zero = torch.randint(6, 11, scale.shape, generator=generator, dtype=torch.uint8)
    scheme = Scheme(activations="dynamic")
    grid = Grid(torch.rand(300, 1, generator=generator), scale, zero, 128, scheme.inner_format)
    layer = QuantizedLinear(scheme, QuantizedWeight(codes, grid), None, LayerReport(0, 0, 0))
    return layer, torch.randn(515, 5000, generator=generator).bfloat16()


@pytest.fixture(params=["FP32", "BF16"])
def products_of(request: Any, monkeypatch: Any) -> None:
    """How the runtime for AVX2 multiplies tiles."""
    if request.param == "BF16" and not products.by_vectors():
        pytest.skip("its processor has no units for BF16 (AVX512_BF16)")
    monkeypatch.setattr(products, "by_vectors", lambda: request.param == "BF16")


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 63, 64, 65, 131, 512, 515])
@needs_avx2
@pytest.mark.usefixtures("products_of")
def test_tokens_few_and_many_of_a_wide_layer_by_avx2(tokens: int) -> None:
    """More columns than the first cache holds, more rows than a piece has."""
    layer, x = _wide_layer()
    _assert_right(layer, x[:tokens])


@pytest.mark.parametrize("tokens", [1, 8, 63, 64, 65])
@pytest.mark.parametrize("scheme", [{"bits": 8}, W4A16, {"group_size": 32}], ids=str)
@needs_avx2
@pytest.mark.usefixtures("products_of")
def test_rows_and_columns_left_over_by_avx2(scheme: dict[str, Any], tokens: int) -> None:
    """A last group, a last unit and a last tile that are not whole."""
    layer, x = layer_of(67, 1111, **scheme)
    _assert_right(layer, x[2000 : 2000 + tokens])


def _assert_right(layer: QuantizedLinear, x: Tensor) -> None:
    definition = W4A8Linear(layer, None)
    exact = _exact(definition, x)
    scale = exact.abs().amax(1, keepdim=True)
    found, expected = avx2.make(layer, None)(x), definition(x)
    error, allowed = ((y.double() - exact).abs() / scale for y in (found, expected))
    assert error.max() <= 2 * allowed.max()
    assert (found == expected).float().mean() > 0.99


@needs_avx2
@pytest.mark.usefixtures("products_of")
def test_more_tokens_give_each_token_the_same_bits_by_avx2() -> None:
    layer, x = _wide_layer()
    module = avx2.make(layer, None)
    whole = module(x)
    assert torch.equal(torch.cat([module(x[:250]), module(x[250:])]), whole)


def test_tables_hold_what_the_grid_decodes() -> None:
    """Every pair of a scale and a zero point once; groups name theirs."""
    layer, _ = layer_of(24, 300, group_size=64)
    assert isinstance(layer.weight, QuantizedWeight)
    grid = layer.weight.grid
    groups, tables = group_tables(grid, 300)
    assert groups.shape == (24, 3, 2)
    scales, zeros = grid.group_scale.flatten().tolist(), grid.zero_point.flatten().tolist()
    assert len(tables) == len(set(zip(scales, zeros, strict=True)))
    low, high = tables.int().unflatten(1, (2, 16)).unbind(1)
    values = (high << 24 | low << 16).view(torch.float32)[groups.flatten(1) // 32]
    for code in range(16):
        codes = torch.full((24, 300), code, dtype=torch.uint8)
        decoded = values[:, :, code].repeat_interleave(64, 1)[:, :300]
        assert torch.equal(decoded, grid.decode8(codes))


def test_the_first_row_that_can_run_here_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    for reason in ("no AMX", ""):
        monkeypatch.setattr(cpu, "unavailable", lambda reason=reason: reason)
        monkeypatch.setattr(avx2, "unavailable", lambda: "")
        assert runtime_for(device).runtime.name == ("avx2" if reason else "cpu")
    monkeypatch.setattr(cpu, "unavailable", lambda: "no AMX")
    monkeypatch.setattr(avx2, "unavailable", lambda: "no FMA")
    with pytest.raises(RuntimeUnavailableError, match=r"cpu .*: no AMX; .*avx2 .*: no FMA"):
        runtime_for(device)


def test_a_processor_without_fma_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "features", lambda: ("avx", "avx2"))
    assert avx2.unavailable() == "its processor has no fma3"


def test_a_copy_computes_the_same() -> None:
    layer, x = layer_of(16, 128)
    runtime = runtime_for(torch.device("cpu"))
    module = runtime(layer, None)
    assert torch.equal(copy.deepcopy(module)(x[:5]), module(x[:5]))
