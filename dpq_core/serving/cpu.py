"""The CPU runtime: four-bit codes in memory, BF16 tile registers (AMX) for the products.

`CpuLinear` holds a weight as `dpq_core.serving.amx` reads it and takes every number of tokens by
one kernel: 64 tokens at a time, whose rounded values stay in the second cache, pass all panels of
16 rows; a panel is decoded anew for each 64. A single token costs what 16 do, and less than reading
the weight in BF16.

    weights  [panels, units, 16, 32] int16   words of four codes, columns 32 apart
             [panels, units, 16, 128] int8   E4M3 or INT8; of each 32 columns the even ones first
    groups   [panels, units, tables, 16, 2] fp32   s4, -s4 * z

A unit is 128 columns, a panel 16 rows, and `tables` the groups that begin in a unit. Rounding to
E4M3 is part of decoding; what lies beyond the format's range must not occur, since decoding does
not clamp (DESIGN's margin of 14/15 sees to it).
"""

import functools
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from dpq_core.kernels import products
from dpq_core.kernels.cpu import bits_of
from dpq_core.kernels.forward_rows import take_threads
from dpq_core.kernels.numba_loops import real, round_rows
from dpq_core.layer.records import QuantizedLinear, QuantizedWeight, RoundedWeight
from dpq_core.serving import amx
from dpq_core.serving.weights import choose_scales, group_pairs, numbers_of, refusal, rows_of

__all__ = ["CpuLinear", "make", "refusal", "unavailable"]


def unavailable() -> str:
    """Why this machine cannot run it."""
    if not torch.cpu._is_amx_tile_supported():
        return "its processor has no tile registers (AMX, from Intel's Sapphire Rapids on)"
    if not products.bf16_units():
        return "the libraries are told not to use BF16 units"
    return "" if torch.cpu._init_amx() else "the operating system does not grant AMX"


def make(layer: QuantizedLinear, bias: Tensor | None) -> nn.Module:
    """Module of a layer that is not refused, and its bias [out]."""
    return CpuLinear(layer, bias)


class CpuLinear(nn.Module):
    """Drop-in for `nn.Linear` in BF16 models on a CPU with tile registers."""

    weights: Tensor
    groups: Tensor
    channel_scale: Tensor  # [16 * panels] fp32
    bias: Tensor  # [16 * panels] fp32
    input_scale: Tensor | None  # fp32 scalar

    def __init__(self, layer: QuantizedLinear, bias: Tensor | None) -> None:
        super().__init__()
        assert not isinstance(layer.weight, Tensor)
        channel_scale: Tensor
        if isinstance(layer.weight, QuantizedWeight):
            rows, features = layer.weight.codes.shape
            grid = layer.weight.grid
            tables = max(1, amx.UNIT // grid.group_size)
            weights = _panels(_words(layer.weight.codes))
            pairs = _panels(group_pairs(grid, features).flatten(2)).unflatten(3, (tables, 2))
            groups = pairs.transpose(2, 3).contiguous()
            kind = ("codes", tables)
            channel_scale = grid.channel_scale
        else:
            rows, features = layer.weight.values.shape
            weights, groups = _panels(_bytes(layer.weight)), torch.zeros(0)
            is_float = layer.weight.values.dtype == torch.float8_e4m3fn
            kind = ("e4m3" if is_float else "int8", 1)
            channel_scale = layer.weight.channel_scale
        self.out_features, self.in_features = rows, features
        missing = -rows % amx.PANEL
        self.register_buffer("weights", weights)
        self.register_buffer("groups", groups)
        self.register_buffer("channel_scale", pad(channel_scale.flatten(), (0, missing)))
        added = torch.zeros(rows) if bias is None else bias.detach().float()
        self.register_buffer("bias", pad(added, (0, missing)))
        self.register_buffer("input_scale", layer.input_scale)
        self._kind, self._kernel = kind[0], _kernel(*kind)
        self._rounds, self._numbers = numbers_of(layer)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] bf16 → [..., out] bf16.

        Raises:
            TypeError: x is not BF16.
        """
        rows = rows_of(x, self.in_features)
        y = rows.new_empty(len(rows), self.out_features)
        threads = take_threads()
        features = -(-self.in_features // amx.UNIT) * amx.UNIT
        tokens = -(-len(rows) // amx.PANEL) * amx.PANEL
        scratch = torch.empty(threads * _SCRATCH + 2 * tokens * features, dtype=torch.uint8)
        self._kernel(
            bits_of(rows),
            self._rounds,
            0.0 if self.input_scale is None else float(self.input_scale),
            self._numbers,
            self.weights.data_ptr(),
            self.groups.data_ptr(),
            self.channel_scale.data_ptr(),
            self.bias.data_ptr(),
            bits_of(y),
            scratch.data_ptr(),
            threads,
        )
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._kind}"


def _words(codes: Tensor) -> Tensor:
    """Codes [out, in] → [out, units, 32] int16: a word's nibbles are columns 32 apart."""
    parts = pad(codes, (0, -codes.shape[1] % amx.UNIT)).unflatten(1, (-1, 4, 32)).int()
    words = sum(parts[:, :, part] << 4 * part for part in range(4))
    assert isinstance(words, Tensor)
    return words.to(torch.int16)


def _bytes(weight: RoundedWeight) -> Tensor:
    """8-bit numbers [out, in] → [out, units, 128] int8: of 32 columns the even ones first."""
    numbers = weight.values.view(torch.int8)
    pairs = pad(numbers, (0, -numbers.shape[1] % amx.UNIT)).unflatten(1, (-1, 4, 16, 2))
    even_first: Tensor = pairs.transpose(3, 4).flatten(2)
    return even_first


def _panels(rows: Tensor) -> Tensor:
    """[out, units, n] → [panels, units, 16, n]."""
    padded: Tensor = pad(rows, (0, 0, 0, 0, 0, -len(rows) % amx.PANEL))
    panels: Tensor = padded.unflatten(0, (-1, amx.PANEL)).transpose(1, 2).contiguous()
    return panels


_SCRATCH = amx.SCRATCH + amx.CONFIG_BYTES  # bytes of a thread
_CONFIG = np.frombuffer(amx.tile_config(), np.uint8)


@functools.cache
def _kernel(kind: str, tables: int) -> Any:
    """`CpuLinear.forward` for one kind of weights; compiled when it first runs, in seconds."""
    multiply = amx.multiplying(kind, tables)
    unit_bytes = (64 if kind == "codes" else 128) * amx.PANEL
    group_bytes = 8 * amx.PANEL * tables if kind == "codes" else 0

    @numba.njit(nogil=True, error_model="numpy")
    def multiply_panels(
        panels: range,
        rows: int,
        units: int,
        weights: int,  # address, as `groups`, `channel_scale`, `bias`, `packed`, `scratch`
        groups: int,
        numbers: NDArray[np.int32],
        channel_scale: int,
        bias: int,
        packed: int,
        scales: NDArray[np.float32],  # [tokens, 1]
        y: NDArray[np.int16],  # [tokens, out] bf16, written
        scratch: int,
    ) -> None:
        tokens = len(y)
        of_tokens = units * 4 * amx.TILE  # bytes of 16 tokens
        before = scratch + amx.SCRATCH
        amx.open_tiles(_CONFIG.ctypes.data, before)
        for first in range(0, -(-tokens // amx.PANEL), amx.MOST_TILES):
            for panel in panels:
                row = amx.PANEL * panel
                multiply(
                    min(amx.MOST_TILES, -(-tokens // amx.PANEL) - first),
                    weights + panel * units * unit_bytes,
                    groups + panel * units * group_bytes,
                    units,
                    packed + first * of_tokens,
                    of_tokens,
                    scratch,
                    numbers[3],
                    numbers[4],
                    numbers[5],
                    channel_scale + 4 * row,
                    bias + 4 * row,
                    rows - row,
                    scales.ctypes.data,
                    first * amx.PANEL,
                    tokens - 1,
                    y.ctypes.data + 2 * row,
                    2 * rows,
                )
        amx.close_tiles(before)

    @numba.njit(nogil=True, parallel=True, error_model="numpy")
    def forward(
        x: NDArray[np.int16],  # [tokens, in] bf16
        rounds: bool,
        static: float,
        numbers: NDArray[np.int32],
        weights: int,
        groups: int,
        channel_scale: int,
        bias: int,
        y: NDArray[np.int16],  # [tokens, out] bf16, written
        scratch: int,
        parts: int,
    ) -> None:
        (tokens, features), rows = x.shape, y.shape[1]
        units, panels = -(-features // amx.UNIT), -(-rows // amx.PANEL)
        scales, packed = np.ones((tokens, 1), np.float32), scratch + parts * _SCRATCH
        for tile in numba.prange(-(-tokens // amx.PANEL)):
            some = slice(tile * amx.PANEL, min((tile + 1) * amx.PANEL, tokens))
            place = packed + tile * units * 4 * amx.TILE
            _pack_tokens(x[some], rounds, static, numbers, scales[some], place)
        for part in numba.prange(parts):
            own = range(part * panels // parts, (part + 1) * panels // parts)
            multiply_panels(
                own, rows, units, weights, groups, numbers, channel_scale, bias, packed, scales,
                y, scratch + part * _SCRATCH,
            )  # fmt: skip

    return forward


@numba.njit(nogil=True, error_model="numpy")
def _pack_tokens(
    x: NDArray[np.int16],  # [up to 16, in] bf16
    rounds: bool,
    static: float,  # sx, or 0 where each token has its own
    numbers: NDArray[np.int32],
    scales: NDArray[np.float32],  # [tokens, 1], written: sx
    packed: int,  # address
) -> None:
    """x8, as tiles of 16 tokens x 32 columns."""
    features = x.shape[1]
    if rounds:
        maximum = real(numbers[0])
        choose_scales(x, static, maximum, scales)
        x8 = np.empty_like(x)
        round_rows(0, len(x), x, scales, x8, maximum, numbers[1], numbers[2])
        x = x8
    for column in range(0, -(-features // amx.UNIT) * amx.UNIT, 32):
        source, target = x.ctypes.data + 2 * column, packed + column // 32 * amx.TILE
        amx.pack(source, 2 * features, len(x) - 1, features - column, target)
