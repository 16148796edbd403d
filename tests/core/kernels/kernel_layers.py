"""Layers and schemes that kernels of quantization are held against their definitions with."""

import torch

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.layer.column_order import column_order
from dpq_core.layer.grid import choose_grid

SCHEMES = [
    {},
    {"order": "none"},
    {"order": "gar"},
    {"inner": "int8", "group_size": 48},
    {"fp8_max": 240, "channel_scale": "tensor", "power_of_two": True, "symmetric": True},
    {"preset": "hopper-vllm", "group_size": 32},
    {"method": "gptq", "inner": "none", "activations": "none"},
    {"method": "naive", "group_size": 32},
]


def layer_of(scheme, rows, features, seed=0):
    """Weight [in, out] and Hessian in the scheme's order, and the grid of the columns. A row of
    zeros, a constant one and one with an outlier among them; strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * features, features, generator=generator)
    x += (
        2
        * torch.randn(4 * features, 3, generator=generator)
        @ torch.randn(3, features, generator=generator)
    )
    x *= torch.rand(features, generator=generator).mul(2).exp()
    weight = torch.randn(rows, features, generator=generator) / 20
    for row, value in ((1, 0), (2, 0.3)):
        weight[row : row + 1] = value
    weight[3:4, features // 2] = 9
    hessian = 2 * x.T @ x / len(x)
    chosen = choose_grid(weight, scheme, hessian.diagonal())
    order = column_order(hessian.diagonal(), scheme.order, scheme.group_size)
    columns = chosen.at(order)
    if scheme.method == "naive":
        columns = ColumnGrid(**{**vars(columns), "inner": None})
    return weight.T[order].contiguous(), hessian[order][:, order].contiguous(), columns
