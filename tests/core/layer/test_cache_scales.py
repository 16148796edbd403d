"""Keys and values in E4M3 by scales of powers of two: the definition, and what scales are."""

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from hypothesis import given
from hypothesis import strategies as st

from dpq_core.layer.kv_cache import CacheMaxima, as_kept

SIZES = 2, 3, 5, 4  # batch, heads, tokens, size
powers = st.integers(-14, 6).map(lambda exponent: 2.0**exponent)


def some(seed, spread=4.0):
    """Keys or values of magnitudes from 2^-spread to 2^spread and beyond, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZES, generator=generator)
    x *= 2 ** (spread * torch.randn(SIZES, generator=generator))
    return torch.where(torch.rand(SIZES, generator=generator) < 0.1, 0, x)


def defined(x, scale):
    """By NumPy: x / s clamped to 448, the nearest E4M3, times s."""
    units = np.clip(x.float().numpy().astype(np.float64) / scale, -448, 448)
    kept = units.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return kept.astype(np.float64) * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(seed=st.integers(0, 1000), scale=powers)
def test_what_is_read_is_the_nearest_e4m3_in_units_of_the_scale(dtype, seed, scale):
    x = some(seed).to(dtype)
    found = as_kept(x, torch.tensor([scale]))
    assert found.dtype == dtype
    expected = torch.from_numpy(defined(x, scale))
    assert torch.equal(found.double(), expected)  # a 16-bit type holds it exactly
    assert torch.equal(as_kept(found, torch.tensor([scale])), found)
    assert torch.equal(as_kept(-x, torch.tensor([scale])), -found)


@given(seed=st.integers(0, 1000), scale=powers)
def test_the_error_is_half_a_step_where_nothing_saturates(seed, scale):
    x = some(seed, spread=1).clamp(-4, 4) * 100 * scale
    away = (as_kept(x, torch.tensor([scale])) - x).abs()
    assert (away <= torch.maximum(x.abs() * 2**-4, torch.tensor(scale * 2**-10))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per", ["tensor", "head"])
@pytest.mark.parametrize("largest", [1e-6, 0.01, 1.0, 300.0, 3e4])
def test_a_library_that_divides_in_the_model_s_type_gives_the_same_numbers(dtype, per, largest):
    """As compressed-tensors does; and by another scale it would not."""
    x = some(7).to(dtype)
    x = x / x.abs().max() * largest
    scale = CacheMaxima.of(x, x).scales(per).keys.to(dtype)
    strategy = "attn_head" if per == "head" else "tensor"
    about = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)

    def theirs(by):
        return fake_quantize(x, by, torch.zeros_like(by), about)

    assert torch.equal(theirs(scale), as_kept(x, scale))
    if largest == 1.0 and dtype == torch.bfloat16:
        other = (scale * 1.4).to(dtype)
        assert not torch.equal(theirs(other), as_kept(x, other))


@given(seed=st.integers(0, 1000), size=powers)
def test_a_scale_is_the_least_power_of_two_that_saturates_nothing(seed, size):
    keys, values = some(seed) * size, some(seed + 1)
    found = CacheMaxima.of(keys, values).scales("tensor")
    for scale, x in ((found.keys, keys), (found.values, values)):
        mantissa, _ = torch.frexp(scale)
        assert scale.shape == (1,)
        assert mantissa == 0.5
        assert scale * 448 >= x.abs().max()
        assert scale == 2**-14 or scale / 2 * 448 < x.abs().max()
    heads = CacheMaxima.of(keys, values).scales("head")
    assert heads.keys.shape == (SIZES[1], 1, 1)
    assert heads.keys.max() == found.keys
    for head in range(SIZES[1]):
        alone = CacheMaxima.of(keys[:, head : head + 1], values).scales("tensor")
        assert heads.keys[head] == alone.keys


def test_no_scale_is_below_what_fp16_holds():
    nothing = torch.zeros(SIZES)
    scales = CacheMaxima.of(nothing, nothing).scales("head")
    assert (scales.keys == 2**-14).all()
    assert torch.equal(scales.keys.half().float(), scales.keys)
    assert torch.equal(as_kept(nothing, scales.keys), nothing)


def test_maxima_of_parts_are_those_of_the_whole_in_any_order():
    keys, values = some(1), some(2)
    whole = CacheMaxima.of(keys, values)
    parts = [CacheMaxima.of(k, v) for k, v in zip(keys.split(1), values.split(1), strict=True)]
    for first, second in (parts, parts[::-1]):
        found = CacheMaxima(first.keys.clone(), first.values.clone())
        found.add(second)
        assert torch.equal(found.keys, whole.keys)
        assert torch.equal(found.values, whole.values)
    stored = CacheMaxima.from_tensors(whole.tensors())
    assert torch.equal(stored.keys, whole.keys)
    assert torch.equal(stored.values, whole.values)
    assert CacheMaxima.from_tensors({"magnitudes": keys}) is None


def test_keys_that_are_not_finite_have_no_scale():
    bad = some(1)
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        CacheMaxima.of(bad, bad).scales("tensor")
