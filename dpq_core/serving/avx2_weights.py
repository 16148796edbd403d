"""Weights as the CPU runtime for AVX2 reads them (`dpq_core.serving.avx2_kernels`).

    codes    [out, units, 64] uint8         two codes a byte, columns 32 apart
    eights   [out, units, 128] int8         E4M3 or INT8
    groups   [out, units, tables] int32     at which byte of the tables those of a group begin
    tables   [pairs, 32] uint8              lower and upper bytes of 16 values in BF16

A unit is 128 columns, and `tables` the groups that begin in a unit. What a code stands for depends
on its group's scale and zero point alone, and a layer has few pairs of these: each pair's 16 values
are stored once, as `Grid.decode8` gives them, and a group says where: four bytes, as many as BF16
scales and zero points take.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpq_core.layer.grid import Grid
from dpq_core.serving.avx2_kernels import COLUMN_OF_BYTE
from dpq_core.serving.weights import UNIT

_COLUMNS = 32  # of a part that is looked up at once


def code_bytes(codes: Tensor) -> Tensor:
    """Codes [out, in] → [out, units, 64] uint8, in the order in which they are looked up."""
    order = torch.tensor(COLUMN_OF_BYTE)
    parts = pad(codes, (0, -codes.shape[1] % UNIT)).unflatten(1, (-1, 2, 2, _COLUMNS))[..., order]
    packed: Tensor = (parts[:, :, :, 0] | parts[:, :, :, 1] << 4).flatten(2)
    return packed.contiguous()


def eight_bits(values: Tensor) -> Tensor:
    """E4M3 or INT8 [out, in] → [out, units * 128] int8."""
    filled: Tensor = pad(values.view(torch.int8), (0, -values.shape[1] % UNIT))
    return filled.contiguous()


def group_tables(grid: Grid, features: int) -> tuple[Tensor, Tensor]:
    """Groups [out, units, tables] int32, and tables [pairs, 32] uint8. Beyond the weight's columns
    any table will do: inputs are zero there."""
    units, per_unit = -(-features // UNIT), max(1, UNIT // grid.group_size)
    scale_bits = grid.group_scale.bfloat16().view(torch.int16).int()
    pairs, number = (scale_bits << 8 | grid.zero_point.int()).unique(return_inverse=True)
    if grid.group_size > UNIT:
        number = number.repeat_interleave(grid.group_size // UNIT, 1)[:, :units]
    filled = pad(number, (0, units * per_unit - number.shape[1]))
    groups = (filled.int() * 32).unflatten(1, (units, per_unit)).contiguous()
    return groups, _tables(grid, pairs)


def _tables(grid: Grid, pairs: Tensor) -> Tensor:
    """pairs [n]: bits of s4 in BF16, then z in 8 bits → [n, 32] uint8."""
    codes = torch.arange(16, dtype=torch.uint8).expand(len(pairs), 16)
    scale = (pairs >> 8).to(torch.int16).view(torch.bfloat16)[:, None]
    zero = (pairs & 0xFF).to(torch.uint8)[:, None]
    values = Grid(torch.ones(len(pairs), 1), scale, zero, 16, grid.inner).decode8(codes)
    halves = values.to(torch.bfloat16).view(torch.uint8).view(-1, 16, 2)  # little-endian
    return halves.transpose(1, 2).flatten(1).contiguous()
