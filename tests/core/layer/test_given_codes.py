"""Given codes under grids of ours: they stay, and the grid is as near as it says."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from dpq_core.layer.given import GivenWeight, given_grid
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.quantize import quantize_layer, quantize_or_keep
from dpq_core.layer.shared_input import SharedInput
from dpq_core.recipe.scheme import Scheme

ROWS, COLUMNS, SIZE = 24, 128, 32
SYMMETRIC = {"method": "keep", "group_size": SIZE, "symmetric": True}
ASYMMETRIC = {"method": "keep", "group_size": SIZE}
HOPPER = {"preset": "hopper-vllm", **SYMMETRIC}
ADA = {"preset": "ada-vllm", **SYMMETRIC}


def random(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def inputs():
    """Some columns count a hundred times as much as others."""
    x = torch.randn(256, COLUMNS, generator=random())
    return x * torch.where(torch.arange(COLUMNS) % 5 == 0, 10.0, 1.0)


@pytest.fixture
def statistics(inputs):
    return statistics_of(inputs)


def statistics_of(x):
    found = InputStatistics.empty(COLUMNS)
    found.add_hessian(x)
    found.add_magnitudes(x)
    return found


def given(symmetric=True, power=False):
    codes = torch.randint(16, (ROWS, COLUMNS), generator=random(), dtype=torch.uint8)
    groups = COLUMNS // SIZE
    scale = torch.rand(ROWS, groups, generator=random(1)) * 0.04 + 0.005
    scale = 2.0 ** torch.randint(-8, -3, (ROWS, groups), generator=random(1)) if power else scale
    zero = torch.full((ROWS, groups), 8, dtype=torch.uint8)
    if not symmetric:
        zero = torch.randint(16, (ROWS, groups), generator=random(2), dtype=torch.uint8)
    return GivenWeight(codes, scale.half().float(), zero, SIZE, torch.bfloat16)


def scheme_of(fields, **more):
    return Scheme.model_validate({**fields, **more})


@pytest.mark.parametrize(
    ("fields", "search"),
    [
        *((fields, "minmax") for fields in (SYMMETRIC, ASYMMETRIC, HOPPER, ADA)),
        *((fields, search) for fields in (SYMMETRIC, ASYMMETRIC) for search in ("mse", "hessian")),
    ],
)
def test_codes_and_zero_points_stay(statistics, fields, search):
    weight = given("symmetric" in fields)
    layer = quantize_layer(weight, statistics, scheme_of(fields, scale_search=search))
    assert torch.equal(layer.weight.codes, weight.codes)
    assert torch.equal(layer.weight.grid.zero_point, weight.zero_point)


def test_the_report_is_the_distance_to_the_given_weight(inputs, statistics):
    weight = given(symmetric=False)
    layer = quantize_layer(weight, statistics, scheme_of(ASYMMETRIC))
    exact, found = weight.decode().double(), layer.decoded().double()
    lost, x = found - exact, inputs.double()
    assert layer.report.given_error == pytest.approx(
        float(lost.square().sum() / exact.square().sum())
    )
    outputs = (x @ lost.T).square().sum() / (x @ exact.T).square().sum()
    assert layer.report.error == pytest.approx(float(outputs), rel=1e-3)
    assert layer.report.as_row()["given_error"] > 1e-5


def test_scales_that_are_powers_of_two_lose_nothing(statistics):
    layer = quantize_layer(given(power=True), statistics, scheme_of(SYMMETRIC, power_of_two=True))
    assert layer.report.given_error == 0
    assert torch.equal(layer.decoded(), given(power=True).decode())


def test_no_weight_is_rounded_for_ada(statistics):
    """Scales of BF16 lose nothing; those of FP16 are what a BF16 model makes of them."""
    weight = given()
    layer = quantize_layer(weight, statistics, scheme_of(ADA))
    assert torch.equal(layer.weight.grid.group_scale, weight.scale.bfloat16())
    assert layer.report.given_error < 2.0**-16
    plain = replace(weight, scale=weight.scale.bfloat16().float())
    assert quantize_layer(plain, statistics, scheme_of(ADA)).report.given_error == 0


@pytest.mark.parametrize("fields", [SYMMETRIC, ASYMMETRIC], ids=str)
def test_a_search_lowers_what_it_searches_for(statistics, fields):
    weight = given("symmetric" in fields)
    plain = quantize_layer(weight, statistics, scheme_of(fields)).report
    least = quantize_layer(weight, statistics, scheme_of(fields, scale_search="mse")).report
    weighted = quantize_layer(weight, statistics, scheme_of(fields, scale_search="hessian")).report
    assert least.given_error < plain.given_error
    assert weighted.error < plain.error


@pytest.mark.parametrize("fields", [SYMMETRIC, ASYMMETRIC], ids=str)
def test_no_row_scale_of_the_octave_is_better(fields):
    """By brute force in float64."""
    weight = given("symmetric" in fields)
    importance = torch.rand(COLUMNS, generator=random(5)) + 0.1
    exact = weight.decode().double()
    steps = weight.codes.float() - weight.zero_point.repeat_interleave(SIZE, 1)

    def error(row):
        group = (weight.scale / row).bfloat16().float().repeat_interleave(SIZE, 1)
        found = row.double() * (group * steps).to(torch.float8_e4m3fn).double()
        return ((found - exact).square() * importance).sum(1)

    least = given_grid(weight, scheme_of(fields), importance).channel_scale
    found = given_grid(weight, scheme_of(fields, scale_search="hessian"), importance)
    best = error(found.channel_scale)
    for step in range(16):
        assert (best <= error(least * 2 ** (step / 16)) * (1 + 1e-6)).all()


@pytest.mark.parametrize("fields", [HOPPER, ADA, {**SYMMETRIC, "power_of_two": True}], ids=str)
def test_a_search_without_anything_to_choose_is_refused(fields):
    with pytest.raises(ValidationError, match="has no row scale to choose"):
        scheme_of(fields, scale_search="mse")


def test_no_code_lies_beyond_the_inner_format(statistics):
    for fields in (SYMMETRIC, ASYMMETRIC, {**SYMMETRIC, "inner": "int8"}):
        layer = quantize_layer(given("symmetric" in fields), statistics, scheme_of(fields))
        assert not layer.weight.grid.saturates()


def test_the_scales_are_those_that_vllm_finds_again(statistics):
    grid = quantize_layer(given(), statistics, scheme_of(HOPPER)).weight.grid
    assert (grid.group_scale.float().amax(1) == 56).all()
    assert torch.equal(
        grid.group_scale, grid.group_scale.to(torch.float8_e4m3fn).to(torch.bfloat16)
    )
    largest = 56 * grid.channel_scale
    assert torch.equal(largest, largest.bfloat16().float())


def test_a_row_of_zeros(statistics):
    weight = given()
    weight.scale[3] = 0
    for fields in (SYMMETRIC, SYMMETRIC | {"scale_search": "mse"}, ADA):
        layer = quantize_layer(weight, statistics, scheme_of(fields))
        assert (layer.decoded()[3] == 0).all()


def test_another_choice_rounds_the_16_bit_weight(statistics):
    weight = given()
    layer = quantize_layer(weight, statistics, scheme_of(SYMMETRIC, bits=8))
    assert layer.decoded() == pytest.approx(weight.in_16_bits().float(), rel=2**-4, abs=1e-3)
    assert layer.report.given_error is None


def test_codes_need_a_single_token():
    one = SharedInput(statistics_of(torch.ones(1, COLUMNS)))
    layer = quantize_or_keep(given(), one, scheme_of(SYMMETRIC), 1.0)
    assert layer.report.kept == ""
    none = SharedInput(InputStatistics.empty(COLUMNS))
    kept = quantize_or_keep(given(), none, scheme_of(SYMMETRIC), 1.0)
    assert torch.equal(kept.weight, given().in_16_bits())
    assert "saw 0 calibration tokens" in kept.report.kept


def test_a_scale_that_is_not_finite_is_refused(statistics):
    weight = given()
    weight.scale[0, 0] = torch.inf
    with pytest.raises(ValueError, match="a given scale is NaN or infinite"):
        quantize_layer(weight, statistics, scheme_of(SYMMETRIC))
