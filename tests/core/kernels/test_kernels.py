"""The kernels for CPUs against the definitions in plain torch that they stand for."""

from unittest.mock import patch

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kernel_layers import SCHEMES, layer_of

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.arithmetic.formats import FORMATS
from dpq_core.kernels import cpu, definitions, numba_loops
from dpq_core.kernels.definitions import choose_block
from dpq_core.kernels.dispatch import residual
from dpq_core.layer.column_loop import inverse_factor, quantize_columns
from dpq_core.layer.gradient_rounding import refine_codes
from dpq_core.layer.grid import choose_grid
from dpq_core.layer.objective import objective
from dpq_core.recipe.scheme import Scheme

SHAPES = [(600, 256), (150, 200), (1, 33), (201, 7)]  # rows, features: short tiles, groups, blocks


def definition():
    """While it lasts, nothing is for the kernels."""
    return patch.object(cpu, "fits", return_value=False)


def both(function):
    """What a function gives by the kernels, and by the definitions."""
    found = function()
    with definition():
        return found, function()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("changes", SCHEMES, ids=str)
def test_column_loop_differs_where_roundings_tie_and_nowhere_else(changes, shape):
    scheme = Scheme(**{"group_size": 32, "block_columns": 64} | changes)
    weight, hessian, columns = layer_of(scheme, *shape)
    factor, _ = inverse_factor(hessian, 0.01)
    found, expected = both(
        lambda: quantize_columns(weight.clone(), columns, factor, scheme.block_columns)
    )
    differing = (found != expected).any(0).nonzero().flatten().tolist()
    assert len(differing) <= 0.02 * shape[0]
    for row in differing:
        first = int((found != expected)[:, row].nonzero()[0])
        assert distance_from_tie(weight, columns, factor, expected, row, first) < 1e-4


def distance_from_tie(weight, columns, factor, codes, row, column):
    """In steps, in float64: how far the working weight is from the middle of two codes, after the
    columns before it took these codes."""
    work = weight[:, row].double().clone()
    decoded = columns.decode(codes)[:, row].double()
    upper = factor.double()
    for j in range(column):
        work -= (work[j] - decoded[j]) / upper[j, j] * upper[j]
    scale = columns[:].group_scale[column, row] * columns.channel_scale[0, row]
    return abs((work[column] / scale.double()) % 1 - 0.5)


numbers = st.floats(-64, 64, width=32, allow_subnormal=False)


@given(
    weight=arrays(np.float32, st.integers(1, 150), elements=numbers),
    scale=st.sampled_from([2.0**-9, 0.07421875, 1.0, 3.015625, 56.0]),
    channel_scale=st.sampled_from([2.0**-12, 0.00103, 1.0]),
    zero_point=st.integers(0, 15),
    inner=st.sampled_from(["e4m3", "e4m3_240", "int8", None]),
)
@settings(deadline=None, max_examples=200)
def test_a_column_alone_is_rounded_to_the_last_bit(weight, scale, channel_scale, zero_point, inner):
    """Nothing is summed, so codes, errors and residuals have the definition's bits."""
    work = torch.from_numpy(weight)[None].clone()
    one = torch.ones_like(work)
    group = torch.zeros(1, dtype=torch.int64)
    inner = FORMATS[inner] if inner else None
    columns = ColumnGrid(channel_scale * one, scale * one, zero_point * one, group, inner)
    factor = torch.full((1, 1), 0.7)
    results = []
    for choose in (cpu.choose_block, choose_block):
        errors, codes = work.clone(), torch.empty_like(work)
        choose(errors, codes, columns, factor)
        results.append((codes, errors))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    codes = results[0][0]
    assert torch.equal(*both(lambda: residual(codes, work.clone(), columns)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("changes", SCHEMES, ids=str)
def test_gradient_passes_end_where_the_definition_s_do(changes, shape):
    """From the same codes. Where a gain is that of the least gain, rows may part; none is worse."""
    scheme = Scheme(**{"group_size": 32, "block_columns": 64} | changes)
    weight, hessian, columns = layer_of(scheme, *shape)
    nearest = quantize_columns(weight.clone(), columns, None, scheme.block_columns)

    def refined():
        codes = nearest.clone()
        return codes, refine_codes(codes, weight, columns, hessian, scheme.block_columns, 8)

    (found, moved), (expected, expected_moved) = both(refined)
    differing = (found != expected).any(0)
    assert differing.sum() <= 0.02 * shape[0]
    assert moved == pytest.approx(expected_moved, rel=0.01)
    assert expected_moved > 0 or shape[0] == 1
    errors = [objective(residual(c, weight.clone(), columns), hessian) for c in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize("passes", [1, 2])
def test_gradient_passes_are_counted(passes):
    scheme = Scheme(group_size=32)
    weight, hessian, columns = layer_of(scheme, 64, 128)

    def refined():
        codes = torch.full_like(weight, 7)
        return refine_codes(codes, weight, columns, hessian, 32, passes), codes

    (found, codes), (expected, _) = both(refined)
    assert found == pytest.approx(expected, rel=0.01)
    assert ((codes >= 0) & (codes <= 15) & (codes == codes.round())).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("search", ["mse", "hessian"])
@pytest.mark.parametrize("changes", SCHEMES, ids=str)
def test_scale_search_finds_the_same_ranges(changes, search, shape):
    scheme = Scheme(**{"group_size": 32, "scale_search": search} | changes)
    rows, features = shape
    weight, *_ = layer_of(scheme, features, rows)  # the transpose of a layer's is one too
    importance = torch.rand(features, generator=torch.Generator().manual_seed(1))
    found, expected = both(lambda: choose_grid(weight, scheme, importance))
    differing = (found.group_scale != expected.group_scale).double().mean()
    assert differing <= 0.01  # two ranges of the same error


@pytest.mark.parametrize("inner", ["e4m3", "int8", None])
def test_group_errors(inner):
    generator = torch.Generator().manual_seed(0)
    scaled = torch.randn(70, 100, generator=generator).mul(60)
    importance = torch.rand(100, generator=generator)
    scale = torch.rand(70, 4, generator=generator).mul(9).add(0.5)
    zero = torch.randint(16, (70, 4), generator=generator).float()
    arguments = scaled, importance, 32, scale, zero, FORMATS[inner] if inner else None
    torch.testing.assert_close(cpu.group_errors(*arguments), definitions.group_errors(*arguments))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_the_bytes(threads):
    scheme = Scheme(group_size=32)
    weight, hessian, columns = layer_of(scheme, 201, 32)
    factor, _ = inverse_factor(hessian, 0.01)
    gradient = torch.randn(201, 32, generator=torch.Generator().manual_seed(0))

    def made():
        work, codes = weight.clone(), torch.empty_like(weight)
        cpu.choose_block(work, codes, columns, factor)
        chosen, slope = codes.clone(), gradient.clone()
        moved = cpu.refine_codes(codes, slope, columns, hessian, 1e-3, 4)
        return work, chosen, codes, slope, torch.tensor(moved)

    alone = made()
    with patch.object(torch, "get_num_threads", return_value=threads):
        assert all(torch.equal(a, b) for a, b in zip(alone, made(), strict=True))


def test_only_single_precision_in_main_memory_fits():
    assert cpu.fits(torch.ones(2), torch.ones(3))
    assert not cpu.fits(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not cpu.fits(torch.ones(2, dtype=torch.bfloat16))
    assert not cpu.fits(torch.ones(2, device="meta"))


def test_without_a_folder_to_write_to_nothing_is_kept(monkeypatch):
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(lambda x: x + 1)
    assert numba_loops.compiled()(lambda x: x + 1)(2) == 3


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 100), st.sampled_from([1, 7, 31, 32, 33, 97]))
def test_two_distributions_are_compared_as_the_definition_does(seed, tokens, pieces):
    torch.manual_seed(seed)
    found, expected = ((_no_logits(tokens)) for _ in range(2))
    for tile in range(3):
        a, b = torch.randn(2, tokens, pieces) * 20
        b, b[-1] = b.round(), b[0] + 1000  # ties; a row that lies elsewhere
        a[:, 0], b[0, -1] = -torch.inf, -torch.inf
        if seed % 3 == 0:
            b[tokens // 2, tile % pieces] = torch.nan
        for each, module in ((found, cpu), (expected, definitions)):
            module.compare(*each, tile * pieces, a, b)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12, equal_nan=True)


def _no_logits(tokens):
    sums = torch.zeros(5, tokens, dtype=torch.float64)
    sums[[0, 3]] = definitions.LEAST
    return sums, torch.zeros(2, tokens, dtype=torch.int64)


def test_exponentials_are_exact_to_the_last_place():
    b = -torch.logspace(-12, 2.8, 100_000)[:, None]  # one piece a token: Σ exp(b − 0) is exp(b)
    sums, best = _no_logits(len(b))
    sums[[0, 3]] = 0
    cpu.compare(sums, best, 0, b, b)
    torch.testing.assert_close(sums[4], b.double().exp()[:, 0], rtol=4e-16, atol=0)
