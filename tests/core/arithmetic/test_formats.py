"""Every code and every BF16 input of every format, against ml_dtypes and against the definition."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_core.arithmetic.formats import FORMATS, quantize, round_to

E4M3_CODES = np.arange(256, dtype=np.uint8)
BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
FINITE_BF16 = BF16[BF16.isfinite()]
FLOATS = ("e4m3", "e4m3_240")
every_format = pytest.mark.parametrize("name", FORMATS)


def grid_of(name):
    """All values of a format, ascending, and which of them have an even code."""
    fmt = FORMATS[name]
    if not fmt.is_float:
        values = np.arange(fmt.minimum, fmt.maximum + 1)
        return values, values % 2 == 0
    positive = E4M3_CODES[:127].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    positive = positive[positive <= fmt.maximum]
    values = np.concatenate([-positive[:0:-1], positive])
    codes = np.concatenate([np.arange(len(positive))[:0:-1], np.arange(len(positive))])
    return values, codes % 2 == 0


def nearest_even(x, name):
    """The definition, by table: nearest value, ties to the even code, saturating."""
    values, even = grid_of(name)
    x = np.clip(x.astype(np.float64), values[0], values[-1])
    above = np.searchsorted(values, x).clip(1, len(values) - 1)
    below = above - 1
    up, down = values[above] - x, x - values[below]
    return np.where((up < down) | ((up == down) & even[above]), values[above], values[below])


def test_all_e4m3_codes_are_those_of_ml_dtypes_and_round_to_themselves():
    ours = torch.from_numpy(E4M3_CODES).view(torch.float8_e4m3fn).float()
    theirs = E4M3_CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(ours.numpy(), theirs)
    rounded = round_to(ours, FORMATS["e4m3"])
    finite = ours.isfinite()
    assert finite.sum() == 254
    codes = rounded.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes[finite], E4M3_CODES[finite])  # the sign of zero too
    assert rounded[~finite].isnan().all()


@pytest.mark.parametrize("name", FLOATS)
def test_bf16_to_e4m3_agrees_with_ml_dtypes_and_saturates(name):
    maximum = FORMATS[name].maximum
    x = FINITE_BF16.float().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)  # NaN where it overflows
    expected = np.where(np.abs(x) >= maximum, np.copysign(np.float32(maximum), x), expected)
    actual = round_to(FINITE_BF16, FORMATS[name])
    assert actual.dtype == torch.float32
    np.testing.assert_array_equal(actual.numpy(), expected)


@every_format
def test_bf16_rounds_to_nearest_even_by_definition(name):
    actual = round_to(FINITE_BF16, FORMATS[name]).numpy()
    np.testing.assert_array_equal(actual, nearest_even(FINITE_BF16.float().numpy(), name))


@every_format
def test_fp32_on_and_beside_every_midpoint(name):
    """Rounding through a third format on the way would move what lies just beside a midpoint."""
    values, _ = grid_of(name)
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(limit)) for limit in (-np.inf, np.inf)]
    x = np.concatenate([middles, *beside])
    actual = round_to(torch.from_numpy(x), FORMATS[name]).numpy()
    np.testing.assert_array_equal(actual, nearest_even(x, name))


@every_format
def test_monotone(name):
    ascending = FINITE_BF16.float().sort().values
    assert (round_to(ascending, FORMATS[name]).diff() >= 0).all()


@pytest.mark.parametrize("name", [*FLOATS, "int8"])
def test_odd(name):
    assert torch.equal(round_to(-FINITE_BF16, FORMATS[name]), -round_to(FINITE_BF16, FORMATS[name]))


@every_format
def test_infinity_saturates_and_nan_stays(name):
    fmt = FORMATS[name]
    low, high, nan = round_to(torch.tensor([-torch.inf, torch.inf, torch.nan]), fmt)
    assert (low, high) == (fmt.minimum, fmt.maximum)
    assert nan.isnan()


@pytest.mark.parametrize(
    ("name", "bits", "minimum", "maximum"),
    [
        ("uint4", 4, 0, 15),
        ("int8", 8, -127, 127),
        ("e4m3", 8, -448, 448),
        ("e4m3_240", 8, -240, 240),
    ],
)
def test_limits(name, bits, minimum, maximum):
    fmt = FORMATS[name]
    assert (fmt.name, fmt.bits, fmt.minimum, fmt.maximum) == (name, bits, minimum, maximum)
    assert fmt.steps == maximum - minimum
    reached = round_to(FINITE_BF16, fmt)
    assert (reached.min(), reached.max()) == (minimum, maximum)
    assert len(reached.unique()) <= 1 << bits


@given(
    name=st.sampled_from(list(FORMATS)),
    exponent=st.integers(-30, 30),
    scale=st.floats(2**-10, 2**10, width=32),
    values=st.lists(st.floats(-(2**12), 2**12, width=16), min_size=1, max_size=20),
)
@settings(deadline=None, max_examples=200)
def test_power_of_two_scaling_moves_only_the_scale(name, exponent, scale, values):
    fmt, factor = FORMATS[name], 2.0**exponent
    x, scale = torch.tensor(values), torch.tensor(scale)
    assert torch.equal(quantize(x * factor, scale * factor, fmt), quantize(x, scale, fmt))


def test_scales_broadcast_and_divide():
    x = torch.tensor([[1.0, 3.0], [10.0, -2.5]])
    scale = torch.tensor([[1.0], [5.0]])
    quantized = quantize(x, scale, FORMATS["int8"])
    assert quantized.tolist() == [[1, 3], [2, -0.0]]  # -2.5 / 5 ties to even zero


@every_format
def test_quantizing_divides(name):
    """Multiplying by a reciprocal would round twice, and move ties."""
    scale = np.float32(0.3)
    middles = grid_of(name)[0].astype(np.float32) + np.float32(0.5)
    x = (middles * scale)[:, None] * (1 + np.arange(-8, 9, dtype=np.float32) * 2.0**-24)
    x = x.astype(np.float32)
    actual = quantize(torch.from_numpy(x), torch.tensor(scale), FORMATS[name])
    np.testing.assert_array_equal(actual.numpy(), nearest_even(x / scale, name))
