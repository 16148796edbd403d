"""The grid against its definition, in float64 and with ml_dtypes for E4M3."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dpq_core.layer import grid as grid_module
from dpq_core.layer.grid import choose_grid, power_of_two_above
from dpq_core.recipe.scheme import Scheme

modest = settings(deadline=None, max_examples=100)

schemes = st.builds(
    Scheme,
    method=st.sampled_from(["rtn", "naive", "dpq"]),
    inner=st.sampled_from(["e4m3", "int8"]),
    fp8_max=st.sampled_from([240, 448]),
    group_size=st.sampled_from([8, 12, 32]),
    symmetric=st.booleans(),
    channel_scale=st.sampled_from(["row", "tensor"]),
    power_of_two=st.booleans(),
)
sixteen_bit = st.builds(
    Scheme,
    method=st.sampled_from(["rtn", "gptq"]),
    inner=st.just("none"),
    activations=st.just("none"),
    group_size=st.sampled_from([8, 12, 32]),
    symmetric=st.booleans(),
)


@st.composite
def weights(draw):
    """Weights of any shape and magnitude; hypothesis likes zeros, constants and outliers."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 40)))
    size = 2.0 ** draw(st.integers(-12, 6))
    elements = st.floats(-8, 8, width=16, allow_subnormal=False)
    return torch.from_numpy(draw(arrays(np.float32, shape, elements=elements)) * np.float32(size))


def random_weight(rows, features, seed=0, tails=0.0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, features, generator=generator)
    return normal * (tails * torch.randn(rows, features, generator=generator)).exp() / 50


def spread(per_group, features, group_size):
    """[out, G] → [out, in]"""
    return np.repeat(per_group.double().numpy(), group_size, axis=1)[:, :features]


def inner_round(values, scheme):
    if scheme.inner == "none":
        return values
    limit = 127 if scheme.inner == "int8" else scheme.fp8_max
    clipped = np.clip(values, -limit, limit)
    if scheme.inner == "int8":
        return np.rint(clipped)
    return clipped.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def half_ulp(values, scheme):
    """Largest error of rounding to the inner format at `values`."""
    if scheme.inner == "none":
        return np.zeros_like(values)
    if scheme.inner == "int8":
        return np.full_like(values, 0.5)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-6)))
    return 2.0 ** (exponent - 4)


def codes_of(grid, weight):
    columns = torch.arange(weight.shape[1])
    return grid.at(columns).encode(weight.T.float()).T


def units(grid, weight, scheme):
    """Weight in units of s8, s4 and z over all columns, codes: all float64."""
    features = weight.shape[1]
    scaled = weight.double().numpy() / grid.channel_scale.double().numpy()
    scale = spread(grid.group_scale, features, scheme.group_size)
    zero = spread(grid.zero_point, features, scheme.group_size)
    return scaled, scale, zero, codes_of(grid, weight).double().numpy()


@given(weight=weights(), scheme=schemes | sixteen_bit)
@modest
def test_error_is_at_most_half_a_step_inside_the_range(weight, scheme):
    grid = choose_grid(weight, scheme, None)
    scaled, scale, zero, codes = units(grid, weight, scheme)
    assert ((codes >= 0) & (codes <= 15) & (codes == np.rint(codes))).all()
    exact = scaled / scale + zero
    inside = (exact >= -0.5) & (exact <= 15.5)
    decoded = inner_round(scale * (codes - zero), scheme)
    bound = scale / 2 + half_ulp(scale * (codes - zero), scheme)
    error = np.abs(decoded - scaled)
    assert (error[inside] <= bound[inside] * (1 + 1e-5)).all()
    np.testing.assert_array_equal(codes[~inside], np.where(exact[~inside] < 0, 0, 15))


@given(weight=weights(), scheme=schemes | sixteen_bit)
@modest
def test_scales_and_zero_points_are_those_of_the_definition(weight, scheme):
    """Row by row and group by group in float64, so short last groups are what they are."""
    grid = choose_grid(weight, scheme, None)
    assert grid.group_scale.dtype == torch.bfloat16
    assert grid.zero_point.dtype == torch.uint8
    assert grid.channel_scale.dtype == torch.float32
    scaled, size = units(grid, weight, scheme)[0], scheme.group_size
    image = scaled if scheme.method in ("naive", "gptq") else inner_round(scaled, scheme)
    for group, start in enumerate(range(0, weight.shape[1], size)):
        part = image[:, start : start + size]
        low, high = part.min(1).clip(max=0), part.max(1).clip(min=0)
        width = 2 * np.maximum(high, -low) if scheme.symmetric else high - low
        scale = grid.group_scale[:, group].double().numpy()
        wanted = np.where(width > 0, width / 15, 1)
        np.testing.assert_allclose(scale, wanted, rtol=2**-8)  # of storage in bf16
        zero = np.full_like(low, 8) if scheme.symmetric else np.rint(-low / scale)
        unsure = np.abs(np.abs(-low / scale % 1) - 0.5) < 1e-5  # a tie that fp32 may see otherwise
        stored = grid.zero_point[:, group].numpy()
        assert (np.abs(stored - zero) <= (0 if scheme.symmetric else unsure)).all()


@given(weight=weights(), scheme=schemes)
@modest
def test_channel_scale(weight, scheme):
    scale = choose_grid(weight, scheme, None).channel_scale
    limit = 127 if scheme.inner == "int8" else scheme.fp8_max
    amax = np.abs(weight.double().numpy()).max(1, keepdims=True)
    if scheme.channel_scale == "tensor":
        amax = np.full_like(amax, amax.max())
    wanted = np.where(amax > 0, amax / (limit * 14 / 15), 1)
    actual = scale.double().numpy()
    assert actual.shape == (len(weight), 1)
    if scheme.power_of_two:
        np.testing.assert_array_equal(np.frexp(actual)[0], 0.5)
        assert (actual >= wanted * (1 - 1e-6)).all()
        assert (actual < wanted * 2 * (1 + 1e-6)).all()
    else:
        np.testing.assert_allclose(actual, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.0, 1.0), (1.0000001, 2.0), (0.75, 1.0), (2**-20, 2**-20), (3 * 2**-140, 2**-138)],
)
def test_power_of_two_above(scale, expected):
    assert power_of_two_above(torch.tensor([scale])).tolist() == [expected]


@given(weight=weights(), scheme=schemes | sixteen_bit)
@modest
def test_zero_stays_exactly_zero(weight, scheme):
    grid = choose_grid(weight, scheme, None)
    codes = codes_of(grid, torch.zeros_like(weight))
    expected = spread(grid.zero_point, weight.shape[1], scheme.group_size)
    np.testing.assert_array_equal(codes.numpy(), expected)
    assert (grid.decode(codes) == 0).all()


def assert_no_overflow(grid, limit):
    steps = torch.arange(16) - grid.zero_point.double().unsqueeze(2)  # [out, G, 16]
    assert (grid.group_scale.double().unsqueeze(2) * steps).abs().max() <= limit


@given(weight=weights(), scheme=schemes)
@modest
def test_no_code_overflows_the_inner_format(weight, scheme):
    assert_no_overflow(
        choose_grid(weight, scheme, None), 127 if scheme.inner == "int8" else scheme.fp8_max
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["dpq", "naive"])
@pytest.mark.parametrize(("inner", "limit"), [("e4m3", 240), ("e4m3", 448), ("int8", 127)])
def test_no_range_of_8_bit_values_overflows(inner, limit, method, symmetric):
    """Every pair (low, high) that a group can have, each in a group of one row."""
    fp8_max = 448 if inner == "int8" else limit
    scheme = Scheme(method=method, inner=inner, fp8_max=fp8_max, symmetric=symmetric, group_size=8)
    top = torch.tensor(limit * 14 / 15)
    if inner == "int8":
        values = torch.arange(128.0)
    else:
        values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.cat([values[values <= top], top[None]])
    weight = torch.zeros(len(values) ** 2, 8)
    weight[:, :2] = torch.cartesian_prod(values, -values)
    grid = choose_grid(weight.view(1, -1), scheme, None)
    assert grid.channel_scale.item() == 1
    assert_no_overflow(grid, limit)


@given(weight=weights(), scheme=schemes, seed=st.integers(0, 99))
@modest
def test_rows_commute(weight, scheme, seed):
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    grid, permuted = choose_grid(weight, scheme, None), choose_grid(weight[order], scheme, None)
    for name in ("channel_scale", "group_scale", "zero_point"):
        assert torch.equal(getattr(permuted, name), getattr(grid, name)[order])
    codes = codes_of(grid, weight)
    assert torch.equal(codes_of(permuted, weight[order]), codes[order])
    assert torch.equal(permuted.decode(codes[order]), grid.decode(codes)[order])


@pytest.mark.parametrize("search", ["minmax", "hessian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_weight(search, dtype):
    scheme = Scheme(group_size=12, scale_search=search)
    importance = torch.linspace(1, 2, 40)
    wide = random_weight(5, 80).to(dtype)
    views = [wide[:, ::2], wide.T[::2].T, wide[:, ::2].contiguous()]
    assert not views[0].is_contiguous()
    first, *others = [choose_grid(view, scheme, importance) for view in views]
    for other in others:
        for name in ("channel_scale", "group_scale", "zero_point"):
            assert torch.equal(getattr(first, name), getattr(other, name))
        assert torch.equal(codes_of(first, views[0]), codes_of(other, views[2]))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
def test_zero_row(symmetric, search):
    scheme = Scheme(group_size=8, symmetric=symmetric, scale_search=search)
    weight = random_weight(3, 20)
    weight[1] = 0
    grid = choose_grid(weight, scheme, torch.ones(20))
    assert grid.channel_scale[1] == 1
    assert (grid.decode(codes_of(grid, weight))[1] == 0).all()
    assert grid.decode(codes_of(grid, weight)).isfinite().all()


@pytest.mark.parametrize("inner", ["e4m3", "int8"])
@pytest.mark.parametrize(("value", "code", "zero"), [(0.3, 15, 0), (-0.3, 0, 15)])
def test_constant_row(inner, value, code, zero):
    weight = torch.full((1, 20), value)
    grid = choose_grid(weight, Scheme(group_size=8, inner=inner), None)
    assert (grid.zero_point == zero).all()
    codes = codes_of(grid, weight)
    assert (codes == code).all()
    torch.testing.assert_close(grid.decode(codes), weight, rtol=0.01, atol=0)


@pytest.mark.parametrize("position", [0, 17, 39])
def test_single_outlier_costs_its_own_group_only(position):
    """E4M3's exponent is what leaves the other groups of the row their precision."""
    weight = torch.linspace(-1, 1, 40).repeat(2, 1)
    weight[1, position] = 500
    grid = choose_grid(weight, Scheme(group_size=8), None)
    decoded = grid.decode(codes_of(grid, weight))
    assert decoded[1, position] == pytest.approx(500, rel=0.01)
    others = torch.arange(40) // 8 != position // 8
    error = (decoded - weight).abs()[1, others]
    assert error.max() <= 1 / 30 + 1 / 16  # half a step of a range of one, and half an ulp


def group_errors(grid, weight, scheme, importance):
    """Σ importance · (w / s8 - ŵ8)² by group [out, G], without the inner rounding for naive."""
    scaled, scale, zero, codes = units(grid, weight, scheme)
    decoded = scale * (codes - zero)
    if scheme.method not in ("naive", "gptq"):
        decoded = inner_round(decoded, scheme)
    error = (decoded - scaled) ** 2 * importance.double().numpy()
    starts = range(0, weight.shape[1], scheme.group_size)
    return np.add.reduceat(error, list(starts), axis=1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("search", ["mse", "hessian"])
@pytest.mark.parametrize(
    ("method", "inner", "fp8_max"),
    [
        ("dpq", "e4m3", 448),
        ("dpq", "e4m3", 240),
        ("dpq", "int8", 448),
        ("naive", "e4m3", 448),
        ("gptq", "none", 448),
    ],
)
def test_shrink_search_never_raises_the_error(method, inner, fp8_max, search, symmetric):
    weight = random_weight(24, 200, seed=1, tails=1.0)
    importance = torch.rand(200, generator=torch.Generator().manual_seed(2)) ** 4
    scheme = Scheme(
        method=method,
        inner=inner,
        fp8_max=fp8_max,
        activations="none",
        symmetric=symmetric,
        group_size=32,
    )
    found = choose_grid(weight, scheme.model_copy(update={"scale_search": search}), importance)
    counted = importance if search == "hessian" else torch.ones(200)
    before = group_errors(choose_grid(weight, scheme, None), weight, scheme, counted)
    after = group_errors(found, weight, scheme, counted)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.98 * before.sum()  # and it does find something


def test_shrink_search_is_the_same_in_slices(monkeypatch):
    weight, scheme = random_weight(7, 40, tails=1.0), Scheme(group_size=8, scale_search="mse")
    whole = choose_grid(weight, scheme, None)
    monkeypatch.setattr(grid_module, "_SEARCH_ELEMENTS", 80)  # two rows at a time
    sliced = choose_grid(weight, scheme, None)
    assert torch.equal(sliced.group_scale, whole.group_scale)
    assert torch.equal(sliced.zero_point, whole.zero_point)


def test_hessian_search_follows_the_importance():
    weight, scheme = random_weight(9, 32, tails=1.0), Scheme(group_size=32, scale_search="hessian")
    important = torch.zeros(32)
    important[3] = 1
    grid = choose_grid(weight, scheme, important)
    plain = choose_grid(weight, scheme.model_copy(update={"scale_search": "mse"}), None)
    errors = [(g.decode(codes_of(g, weight)) - weight)[:, 3].abs().sum() for g in (grid, plain)]
    assert errors[0] < errors[1]


def test_hessian_search_needs_statistics():
    with pytest.raises(ValueError, match="statistics"):
        choose_grid(torch.ones(2, 16), Scheme(group_size=8, scale_search="hessian"), None)
