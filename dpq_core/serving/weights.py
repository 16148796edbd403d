"""What the CPU runtimes have in common: which layers they take, scales, roundings."""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from dpq_core.arithmetic.formats import NumberFormat
from dpq_core.kernels.cpu import rounding
from dpq_core.kernels.numba_loops import EXPONENT, STEPS, real
from dpq_core.layer.grid import Grid
from dpq_core.layer.records import QuantizedLinear, QuantizedWeight

UNIT = 128  # columns that a kernel decodes at a time


def refusal(layer: QuantizedLinear) -> str:
    """Why there is no kernel for a layer."""
    if isinstance(layer.weight, Tensor):
        return "kept in 16 bits"
    if layer.scheme.inner == "none" and layer.scheme.activations != "none":
        return "no kernel for E4M3 inputs with weights that are not rounded to E4M3"
    if isinstance(layer.weight, QuantizedWeight):
        grid = layer.weight.grid
        if grid.group_size not in (32, 64) and grid.group_size % UNIT:
            return f"groups of {grid.group_size}: kernels take 32, 64 and multiples of {UNIT}"
        if grid.inner and grid.reach() > grid.inner.maximum:
            return f"codes that stand for more than {grid.inner.maximum:g}"
    return ""


def rows_of(x: Tensor, features: int) -> Tensor:
    """x [..., features] bf16 → its tokens [n, features], contiguous.

    Raises:
        TypeError: x is not BF16.
    """
    if x.dtype != torch.bfloat16:
        raise TypeError(f"the CPU runtime takes BF16 inputs, not {x.dtype}: load the model so")
    return x.detach().reshape(-1, features).contiguous()


def group_pairs(grid: Grid, features: int) -> Tensor:
    """s4 and -s4 * z of every unit's groups, [out, units, tables, 2] fp32; zero beyond the weight.
    `tables` are the groups that begin in a unit."""
    units = -(-features // UNIT)
    scale = grid.group_scale.float()
    both = torch.stack([scale, -scale * grid.zero_point], 2)  # [out, G, 2]
    if grid.group_size > UNIT:
        both = both.repeat_interleave(grid.group_size // UNIT, 1)[:, :units]
    tables = max(1, UNIT // grid.group_size)
    padded = pad(both, (0, 0, 0, units * tables - both.shape[1]))
    pairs: Tensor = padded.unflatten(1, (units, tables)).contiguous()
    return pairs


def numbers_of(layer: QuantizedLinear) -> tuple[bool, NDArray[np.int32]]:
    """Whether a layer's inputs are rounded; the three numbers that round them (`cpu.rounding`), and
    the three that round its decoded weights, as bits."""
    inner = layer.scheme.inner_format
    rounds = inner is not None and layer.scheme.activations != "none"
    limits = rounding(inner) if inner and rounds else (np.float32(0),) * 3
    grid = layer.weight.grid if isinstance(layer.weight, QuantizedWeight) else None
    numbers = *limits, *steps(grid.inner if grid else None)
    return rounds, np.array([np.int32(number.view(np.int32)) for number in numbers])


def steps(fmt: NumberFormat | None) -> tuple[np.int32, ...]:
    """What rounds decoded values to a format's grid, see `cpu.rounding`; None is BF16."""
    if fmt is None:
        return EXPONENT, np.int32(0), np.int32(16 << 23 | 1 << 22)  # seven bits of mantissa
    _, mask, lowest = rounding(fmt)
    return mask, lowest, STEPS


@numba.njit(nogil=True, error_model="numpy")
def choose_scales(
    x: NDArray[np.int16], static: float, maximum: np.float32, scales: NDArray[np.float32]
) -> None:
    """sx of each token: the static one, or `linear.token_scale`."""
    for token in range(len(x)):
        scales[token, 0] = static
        if not static:
            bits = np.int16(0)
            for column in range(x.shape[1]):
                bits = max(bits, np.int16(x[token, column] & 0x7FFF))
            amax = real(np.int32(bits) << 16)
            scales[token, 0] = amax / maximum if bits else np.float32(1)
