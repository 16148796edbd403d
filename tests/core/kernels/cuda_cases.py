"""Quantization's Triton kernels, launched: on a CUDA device, or, with TRITON_INTERPRET=1, in the
interpreter.

    python -m pytest tests/core/kernels/cuda_cases.py

`test_cuda.py` runs this in a process of its own, for the interpreter is chosen when Triton is
imported.
"""

import os
from dataclasses import replace

import pytest
import torch
from kernel_layers import SCHEMES, layer_of

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.arithmetic.formats import FORMATS
from dpq_core.kernels import cuda
from dpq_core.kernels.definitions import MAGNITUDES, choose_block, group_errors, step_columns
from dpq_core.kernels.dispatch import count_magnitudes, residual
from dpq_core.layer.column_loop import inverse_factor
from dpq_core.layer.hessian import InputStatistics
from dpq_core.recipe.scheme import Scheme

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def device():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device("cpu" if INTERPRETED else "cuda")


def on(grid: ColumnGrid, device):
    moved = {n: t.to(device) for n, t in vars(grid).items() if isinstance(t, torch.Tensor)}
    return replace(grid, **moved)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("rows", "features", "columns"), [(70, 96, 33), (33, 64, 64)])
def test_a_block_gets_the_definitions_codes(scheme, rows, features, columns, device):
    """Of the first block. A row may differ after two roundings that tie within float error."""
    weight, hessian, grid = layer_of(Scheme(**scheme), rows, features)
    factor, _ = inverse_factor(hessian, 0.01)
    block = slice(0, columns)
    corner = factor[block, block]
    expected, found = weight[block].clone(), weight[block].clone().to(device)
    codes, ours = torch.empty_like(expected), torch.empty_like(found)
    choose_block(expected, codes, grid.part(block), corner)
    cuda.choose_block(found, ours, on(grid.part(block), device), corner.to(device))
    same = (codes == ours.cpu()).all(0)
    assert same.float().mean() >= 0.97
    torch.testing.assert_close(found.cpu()[:, same], expected[:, same], rtol=1e-3, atol=1e-4)
    assert torch.equal(codes[0], ours[0].cpu())  # nothing was passed on to the first column


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("rows", "features", "columns"), [(70, 96, 33), (33, 64, 64)])
def test_a_block_takes_the_definitions_steps(scheme, rows, features, columns, device):
    weight, hessian, grid = layer_of(Scheme(**scheme), rows, features)
    block = slice(0, columns)
    part, corner = grid.part(block), hessian[block, block]
    codes = grid.encode(weight)
    gradient = (hessian @ residual(codes, weight.clone(), grid))[block]
    expected, found = codes[block].clone(), codes[block].clone().to(device)
    steps = step_columns(expected, gradient.clone(), part, corner, 1e-3)
    ours = cuda.step_columns(found, gradient.to(device), on(part, device), corner.to(device), 1e-3)
    same = (expected == found.cpu()).all(0)
    assert (expected != codes[block]).any()
    assert same.float().mean() >= 0.97
    torch.testing.assert_close(ours.cpu()[:, same], steps[:, same], rtol=1e-4, atol=1e-7)
    assert torch.equal(ours.cpu()[:, same] != 0, steps[:, same] != 0)


@pytest.mark.parametrize("inner", [None, "e4m3", "e4m3_240", "int8"])
@pytest.mark.parametrize(("features", "group_size"), [(256, 128), (200, 48), (300, 300)])
def test_errors_of_groups(features, group_size, inner, device):
    generator = torch.Generator().manual_seed(0)
    scaled = torch.randn(70, features, generator=generator) * 60
    importance = torch.rand(features, generator=generator)
    groups = -(-features // group_size)
    scale = torch.rand(70, groups, generator=generator) * 20 + 1
    zero = torch.randint(16, (70, groups), generator=generator).float()
    fmt = FORMATS[inner] if inner else None
    expected = group_errors(scaled, importance, group_size, scale, zero, fmt)
    moved = [each.to(device) for each in (scaled, importance, scale, zero)]
    found = cuda.group_errors(*moved[:2], group_size, *moved[2:], fmt)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("n", [1, 5000, 200_000])
def test_magnitudes_are_counted(n, device):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[: n // 3] = -0.5
    found = cuda.count_magnitudes(x.to(device), MAGNITUDES)
    assert torch.equal(found.cpu(), count_magnitudes(x))


@pytest.mark.skipif(INTERPRETED, reason="of a CUDA device: tensor cores")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_hessians_by_tensor_cores_are_those_of_float64(kind, scale, device):
    """Whatever the operands' type. A tensor core's FP32 sums are cut off, not rounded: 1.3e-5 on an
    H100, where FP32 products have 6e-7."""
    x = torch.randn(4096, 320, generator=torch.Generator().manual_seed(0))
    x = (x * torch.rand(320, generator=torch.Generator().manual_seed(1)).exp() ** 3).to(kind)
    factor = 2 * (scale or 1.0) ** 2
    exact = factor * (x.double().T @ x.double())
    statistics = InputStatistics.empty(320, device)
    statistics.add_hessian(x.to(device), None if scale is None else torch.tensor(scale))
    error = (statistics.hessian_sum.cpu().double() - exact).norm() / exact.norm()
    assert error < 4e-5
    assert torch.equal(statistics.hessian_sum, statistics.hessian_sum.T)
