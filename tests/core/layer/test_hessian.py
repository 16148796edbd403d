import functools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_core.arithmetic.formats import FORMATS, quantize
from dpq_core.kernels import blas, cpu
from dpq_core.kernels.definitions import MAGNITUDES
from dpq_core.kernels.dispatch import count_magnitudes
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.input_scale import static_input_scale, static_scale_of
from dpq_core.layer.quantize import quantize_layer
from dpq_core.layer.token_weights import equal_norms, raise_first
from dpq_core.recipe.scheme import Scheme

FEATURES = 24
EIGHT_BIT = ("e4m3", "e4m3_240", "int8")


def inputs(tokens=96, features=FEATURES, seed=0):
    """Correlated inputs with a few outlier features."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator)
    x = torch.randn(tokens, features, generator=generator) @ mixing
    x[:, ::7] *= 10
    return x


def counted(x):
    statistics = InputStatistics.empty(x.shape[-1])
    statistics.add_hessian(x)
    statistics.add_magnitudes(x)
    return statistics


def assert_same(actual, expected):
    scale = expected.hessian_sum.diagonal().max().item()
    torch.testing.assert_close(
        actual.hessian_sum, expected.hessian_sum, rtol=1e-5, atol=1e-6 * scale
    )
    assert actual.tokens == expected.tokens
    assert torch.equal(actual.magnitudes, expected.magnitudes)


@given(
    cuts=st.lists(st.integers(1, 95), max_size=6, unique=True),
    seed=st.integers(0, 1 << 16),
    tree=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_any_batching_order_and_merge_tree_gives_the_same(cuts, seed, tree):
    x = inputs()
    generator = torch.Generator().manual_seed(seed)
    parts = list(x[torch.randperm(96, generator=generator)].tensor_split(sorted(cuts)))
    if not tree:
        total = InputStatistics.empty(FEATURES)
        for part in parts:
            total.add_hessian(part.unsqueeze(0))  # leading dimensions do not matter
            total.add_magnitudes(part)
    else:
        forest = [counted(part) for part in parts]
        while len(forest) > 1:
            first, second = torch.randperm(len(forest), generator=generator)[:2].tolist()
            forest[first].add(forest[second])
            del forest[second]
        total = forest[0]
    assert_same(total, counted(x))


def test_hessian_is_the_mean_of_2_x_xt():
    x = inputs()
    exact = 2 * x.double().T @ x.double() / len(x)
    scale = exact.diagonal().max().item()
    hessian = counted(x).hessian()
    torch.testing.assert_close(hessian.double(), exact, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_norms_leave_the_directions(dtype):
    x = inputs().to(dtype).view(4, 24, FEATURES)
    x[0, 0] *= 500  # a sink
    x[1, 1] = 0
    equal = equal_norms(x)
    assert equal.dtype == dtype
    norms = x.double().norm(dim=-1, keepdim=True)
    norms[norms == 0] = 1
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-12}
    torch.testing.assert_close(equal.double(), x.double() / norms, **tolerance)


def test_the_first_token_has_its_share_of_a_window():
    x = equal_norms(inputs().view(4, 24, FEATURES))
    energy = raise_first(x, 0.125).square().sum(-1)
    torch.testing.assert_close(energy[:, 0] / energy.sum(1), torch.full((4,), 0.125))
    assert torch.equal(raise_first(x, 0.125)[:, 1:], x[:, 1:])


def test_a_sink_does_not_own_the_hessian_of_equal_norms():
    """GPTQ by the plain Hessian gives away the other tokens for the sink's."""
    x = inputs(tokens=400)
    x[0] = 500 * x.norm(dim=1).median() * torch.nn.functional.normalize(torch.ones(FEATURES), dim=0)
    others, weight = x[1:], torch.randn(64, FEATURES, generator=torch.Generator().manual_seed(1))
    names = {"method": "gptq", "inner": "none", "activations": "none", "group_size": 8}
    errors = []
    for seen in (equal_norms(x), x):
        layer = quantize_layer(weight, counted(seen), Scheme(**names, rounding="nearest"))
        residual = (layer.decoded() - weight) @ others.T
        errors.append((residual.square().sum(0) / others.square().sum(1)).mean())
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.skipif(blas.bf16_product is None, reason="this torch comes without MKL")
@pytest.mark.parametrize("tokens", [1, 96, 3000])
@pytest.mark.parametrize("name", [None, *EIGHT_BIT])
def test_bf16_units_sum_as_exactly_as_fp32(name, tokens):
    """At most twice the error of FP32 products, against float64."""
    x, scale = inputs(tokens=tokens).bfloat16(), None
    if name:
        scale = x.abs().max().float() / FORMATS[name].maximum
        x = cpu.quantize(x, scale, FORMATS[name])
    unit = 1.0 if scale is None else scale.double().item()
    exact = 2 * unit**2 * x.double().T @ x.double()
    errors = []
    for seen in (x, x.float()):
        statistics = InputStatistics.empty(FEATURES)
        statistics.add_hessian(seen, scale)
        assert statistics.tokens == tokens
        errors.append((statistics.hessian_sum.double() - exact).norm())
    assert errors[0] <= 2 * errors[1] + 1e-12 * exact.norm()
    assert errors[1] <= 1e-6 * exact.norm()


def test_magnitudes_of_bf16_are_counted_as_those_of_any_type():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = torch.cat([every, every[::3]]).view(torch.bfloat16)
    x = x[~x.isnan()]  # FP32 would change the bits of a NaN
    assert torch.equal(count_magnitudes(x[None]), count_magnitudes(x.float()))


@pytest.mark.parametrize("tokens", [5, 96])
def test_symmetric_and_positive_semidefinite(tokens):
    hessian = counted(inputs(tokens)).hessian().double()
    values = torch.linalg.eigvalsh(hessian)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-6, atol=1e-6 * values[-1].item())
    assert values[0] >= -1e-5 * values[-1]
    assert (values > 1e-5 * values[-1]).sum() <= tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_magnitudes_are_exact_counts_of_bf16_bits(dtype):
    x = inputs().to(dtype)
    x[0, :4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    bits = x.abs().float().numpy().astype(ml_dtypes.bfloat16).view(np.uint16)
    expected = np.bincount(bits.ravel(), minlength=MAGNITUDES)
    np.testing.assert_array_equal(counted(x).magnitudes.numpy(), expected)


def test_statistics_of_different_inputs_do_not_add():
    with pytest.raises(ValueError, match="24 and 25"):
        InputStatistics.empty(24).add(InputStatistics.empty(25))


def test_tensors_round_trip():
    statistics = counted(inputs())
    again = InputStatistics.from_tensors(statistics.tensors())
    assert torch.equal(again.hessian_sum, statistics.hessian_sum)
    assert again.tokens == 96
    assert torch.equal(again.magnitudes, statistics.magnitudes)


def test_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="no calibration token"):
        InputStatistics.empty(8).hessian()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_inputs_that_are_not_finite_are_refused(bad, activations):
    x = inputs()
    x[3, 5] = bad
    statistics = counted(x)
    with pytest.raises(ValueError, match="not finite"):
        statistics.hessian()
    with pytest.raises(ValueError, match="no finite"):
        static_input_scale(statistics.magnitudes, FORMATS["e4m3"], "amax")
    with pytest.raises(ValueError, match="finite"):
        quantize_layer(torch.ones(2, FEATURES), statistics, Scheme(activations=activations))


# Static scales


def squared_error(x, scale, fmt):
    residual = (quantize(x, scale, fmt) * scale).double() - x.double()
    return residual.square().sum().item()


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_amax_meets_the_maximum(name):
    x = inputs().bfloat16()
    scale = static_input_scale(counted(x).magnitudes, FORMATS[name], "amax")
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert scale.item() == pytest.approx(x.abs().max().item() / FORMATS[name].maximum, rel=1e-6)


@pytest.mark.parametrize("tokens", [7, 96, 1000])
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_percentile_covers_999_of_1000_values_and_no_more(name, tokens):
    x = inputs(tokens).bfloat16()
    ascending = x.abs().float().flatten().sort().values
    needed = -(-999 * len(ascending) // 1000)  # of so many smallest values
    scale = static_input_scale(counted(x).magnitudes, FORMATS[name], "percentile")
    expected = ascending[needed - 1].item() / FORMATS[name].maximum
    assert scale.item() == pytest.approx(expected, rel=1e-6)


def test_percentile_of_mostly_zeros_is_not_zero():
    x = torch.zeros(5000)
    x[7] = 3
    scale = static_input_scale(counted(x[:, None]).magnitudes, FORMATS["int8"], "percentile")
    assert scale.item() == pytest.approx(3 / 127)


@pytest.mark.parametrize("name", EIGHT_BIT)
@pytest.mark.parametrize("seed", range(4))
def test_mse_is_the_best_of_the_shrunk_ranges(name, seed):
    x, fmt = inputs(400, seed=seed).bfloat16().float(), FORMATS[name]
    magnitudes = counted(x).magnitudes
    error = squared_error(x, static_input_scale(magnitudes, fmt, "mse"), fmt)
    eighths = [x.abs().max() * 2 ** (-step / 8) / fmt.maximum for step in range(48)]
    errors = [squared_error(x, scale, fmt) for scale in eighths]
    assert error <= errors[0]  # amax
    assert error == pytest.approx(min(errors), rel=1e-6)


def test_mse_of_int8_gives_up_an_outlier():
    """In FP8 an outlier costs the others nothing; in INT8 it takes their steps."""
    x = torch.randn(500_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0] = 40
    magnitudes, fmt = counted(x[:, None]).magnitudes, FORMATS["int8"]
    amax, mse = (static_input_scale(magnitudes, fmt, how) for how in ("amax", "mse"))
    assert mse < 0.6 * amax
    assert squared_error(x, mse, fmt) < squared_error(x, amax, fmt)


@pytest.mark.parametrize("estimator", ["amax", "percentile", "mse"])
def test_all_zero_activations_have_scale_one(estimator):
    magnitudes = counted(torch.zeros(3, 8)).magnitudes
    assert static_input_scale(magnitudes, FORMATS["e4m3"], estimator) == 1


@pytest.mark.parametrize("estimator", ["amax", "percentile", "mse"])
def test_power_of_two_static_scale_is_the_next_above(estimator):
    magnitudes = counted(inputs()).magnitudes
    plain = static_scale_of(magnitudes, Scheme(activation_range=estimator))
    scale = static_scale_of(magnitudes, Scheme(activation_range=estimator, power_of_two=True))
    assert torch.frexp(scale).mantissa == 0.5
    assert plain <= scale < 2 * plain


# Columns that calibration never excited


@functools.cache
def statistics_with_dead_columns(dead):
    x = inputs(200)
    x[:, list(dead)] = 0
    return counted(x)


@pytest.mark.parametrize("dead", [(0,), (3, 8, 23), tuple(range(FEATURES))])
@pytest.mark.parametrize("order", ["none", "gar", "activation"])
@pytest.mark.parametrize("method", ["gptq", "naive", "dpq"])
def test_dead_columns_stay_as_rounded_to_nearest(method, order, dead):
    weight = torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(5)) / 30
    inner = "none" if method == "gptq" else "e4m3"
    scheme = Scheme(method=method, inner=inner, activations="none", order=order, group_size=8)
    layer = quantize_layer(weight, statistics_with_dead_columns(dead), scheme)
    grid = layer.weight.grid
    nearest = grid.at(torch.arange(FEATURES)).encode(weight.T).T.to(torch.uint8)
    assert torch.equal(layer.weight.codes[:, list(dead)], nearest[:, list(dead)])
    if len(dead) < FEATURES:
        assert not torch.equal(layer.weight.codes, nearest)
