"""The CPU runtime for AVX2: four-bit codes in memory, FP32 products.

`Avx2Linear` holds a weight as `dpq_core.serving.avx2_kernels` reads it. Tokens pass 8 at a time,
rounded, as FP32; threads share the rows of the weight, which are decoded anew for each 8 tokens, in
registers. Reading the codes takes a seventh of what reading the weight in FP32 does.

    weights  [out, units, 64] uint8    two codes a byte, columns 32 apart
             [out, units, 128] int8    E4M3 or INT8
    groups   [out, units, tables, 2] fp32   s4, -s4 * z

A unit is 128 columns, and `tables` the groups that begin in a unit. As in `dpq_core.serving.cpu`
rounding to E4M3 is part of decoding, and what lies beyond the format's range is refused.
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
from dpq_core.kernels.blas import sgemm
from dpq_core.kernels.cpu import bits_of
from dpq_core.kernels.forward_rows import add_product, scale_rows, take_threads, widen
from dpq_core.kernels.numba_loops import real, round_rows
from dpq_core.layer.records import QuantizedLinear, QuantizedWeight
from dpq_core.serving import avx2_kernels
from dpq_core.serving.avx2_kernels import COLUMN_OF_BYTE, LANES, WIDTHS, sizes
from dpq_core.serving.weights import UNIT, choose_scales, group_pairs, numbers_of, refusal, rows_of

__all__ = ["Avx2Linear", "make", "refusal", "unavailable"]

_COLUMNS = 32  # of a part that is looked up at once
_INPUTS = 32  # units times tokens whose inputs stay in the first cache: 16 KiB
_FEW = 12  # tokens up to which weights are decoded in registers
_APART = 16  # columns between tokens, which would otherwise share places in the first cache
_BATCH = 4096  # tokens whose inputs are held as FP32
_TOKENS, _PIECE, _DEPTH = 512, 512, 8  # at a time: tokens, rows of the weight, units


def unavailable() -> str:
    """Why this machine cannot run it."""
    missing = {"avx2", "fma3"}.difference(products.features())
    return f"its processor has no {' and no '.join(sorted(missing))}" if missing else ""


def make(layer: QuantizedLinear, bias: Tensor | None) -> nn.Module:
    """Module of a layer that is not refused, and its bias [out]."""
    return Avx2Linear(layer, bias)


class Avx2Linear(nn.Module):
    """Drop-in for `nn.Linear` in BF16 models on a CPU with AVX2."""

    weights: Tensor
    groups: Tensor
    channel_scale: Tensor  # [out] fp32
    bias: Tensor  # [out] fp32, or empty
    input_scale: Tensor | None  # fp32 scalar

    def __init__(self, layer: QuantizedLinear, bias: Tensor | None) -> None:
        super().__init__()
        assert not isinstance(layer.weight, Tensor)
        if isinstance(layer.weight, QuantizedWeight):
            grid = layer.weight.grid
            self.out_features, self.in_features = layer.weight.codes.shape
            weights, groups = _bytes(layer.weight.codes), group_pairs(grid, self.in_features)
            kind, channel_scale = ("codes", max(1, UNIT // grid.group_size)), grid.channel_scale
        else:
            values = layer.weight.values
            self.out_features, self.in_features = values.shape
            weights, groups = pad(values.view(torch.int8), (0, -values.shape[1] % UNIT)), None
            kind = ("e4m3" if values.dtype == torch.float8_e4m3fn else "int8", 1)
            channel_scale = layer.weight.channel_scale
        self.register_buffer("weights", weights.contiguous())
        self.register_buffer("groups", torch.zeros(0) if groups is None else groups)
        self.register_buffer("channel_scale", channel_scale.flatten())
        added = torch.zeros(0) if bias is None else bias.detach().float()
        self.register_buffer("bias", added)
        self.register_buffer("input_scale", layer.input_scale)
        self._kind = kind  # and not its kernel, which cannot be copied
        self._rounds, self._numbers = numbers_of(layer)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] bf16 → [..., out] bf16.

        Raises:
            TypeError: x is not BF16.
        """
        rows = rows_of(x, self.in_features)
        y = rows.new_empty(len(rows), self.out_features)
        threads = take_threads()
        width = -(-self.in_features // UNIT) * UNIT
        for some, found in zip(rows.split(_BATCH), y.split(_BATCH), strict=True):
            eights = -(-len(some) // LANES) * LANES
            _kernel(*self._kind)(
                bits_of(some),
                self._rounds,
                0.0 if self.input_scale is None else float(self.input_scale),
                self._numbers,
                self.weights.data_ptr(),
                self.groups.data_ptr(),
                self.channel_scale.numpy(),
                self.bias.numpy(),
                bits_of(found),
                np.ones((len(some), 1), np.float32),
                np.empty((eights, width + _APART), np.float32),
                threads,
            )
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._kind[0]}"


def _bytes(codes: Tensor) -> Tensor:
    """Codes [out, in] → [out, units, 64] uint8, in the order in which they are looked up."""
    order = torch.tensor(COLUMN_OF_BYTE)
    parts = pad(codes, (0, -codes.shape[1] % UNIT)).unflatten(1, (-1, 2, 2, _COLUMNS))[..., order]
    packed: Tensor = (parts[:, :, :, 0] | parts[:, :, :, 1] << 4).flatten(2)
    return packed


@functools.cache
def _kernel(kind: str, tables: int) -> Any:
    """`Avx2Linear.forward` for one kind of weights; compiled when it first runs, in seconds."""
    few = _few(kind, tables)
    many = few if sgemm is None else _many(kind, tables)

    @numba.njit(nogil=True, parallel=True, error_model="numpy")
    def forward(
        x: NDArray[np.int16],  # [tokens, in] bf16
        rounds: bool,
        static: float,
        numbers: NDArray[np.int32],
        weights: int,
        groups: int,
        channel_scale: NDArray[np.float32],
        bias: NDArray[np.float32],
        y: NDArray[np.int16],  # [tokens, out] bf16, written
        scales: NDArray[np.float32],  # [tokens, 1], ones, written
        wide: NDArray[np.float32],  # [tokens, filled up to 8, units * 128 and some], written
        parts: int,
    ) -> None:
        tokens, rows = y.shape
        for number in numba.prange(len(wide) // LANES):
            _prepare(number * LANES, x, rounds, static, numbers, scales, wide)
        for part in numba.prange(parts):
            first, last = part * rows // parts, (part + 1) * rows // parts
            scaled = channel_scale[first:last], bias[first:last] if bias.size else bias
            if tokens > _FEW:
                many(first, last, wide, scales, numbers, weights, groups, *scaled, y)
            else:
                few(first, last, wide, scales, numbers, weights, groups, *scaled, y)

    return forward


def _few(kind: str, tables: int) -> Any:
    """Some rows of the weight, decoded in registers for each 8 tokens."""
    one, two, four, eight = (avx2_kernels.multiplying(kind, tables, width) for width in WIDTHS)
    unit_bytes, group_bytes = sizes(kind, tables)

    @numba.njit(nogil=True, error_model="numpy")
    def multiply(
        first: int,
        last: int,
        units: int,
        weights: int,  # address, as `groups`
        groups: int,
        numbers: NDArray[np.int32],
        x: NDArray[np.float32],  # [tokens, units * 128]: `width` and more
        width: int,
        sums: NDArray[np.float32],  # [last - first, 8], zero, written
    ) -> None:
        row, of_row, block = units * unit_bytes, units * group_bytes, _INPUTS // width
        for unit in range(0, units, block):
            count = min(block, units - unit)
            weight = weights + first * row + unit * unit_bytes
            group = groups + first * of_row + unit * group_bytes
            at, stride, to = x.ctypes.data + 4 * UNIT * unit, 4 * x.shape[1], sums.ctypes.data
            n, a, b, c = last - first, numbers[3], numbers[4], numbers[5]
            if width == 1:
                one(n, weight, row, group, of_row, count, at, stride, to, a, b, c)
            elif width == 2:
                two(n, weight, row, group, of_row, count, at, stride, to, a, b, c)
            elif width == 4:
                four(n, weight, row, group, of_row, count, at, stride, to, a, b, c)
            else:
                eight(n, weight, row, group, of_row, count, at, stride, to, a, b, c)

    @numba.njit(nogil=True, error_model="numpy")
    def few(
        first: int,
        last: int,
        x: NDArray[np.float32],
        scales: NDArray[np.float32],
        numbers: NDArray[np.int32],
        weights: int,
        groups: int,
        channel_scale: NDArray[np.float32],  # [last - first], as `bias`
        bias: NDArray[np.float32],
        y: NDArray[np.int16],
    ) -> None:
        units, sums = x.shape[1] // UNIT, np.empty((last - first, LANES), np.float32)
        of_tokens = np.empty((LANES, last - first), np.float32)
        for token in range(0, len(y), LANES):
            stop, width = min(token + LANES, len(y)), 1
            while width < stop - token:
                width *= 2
            _turn(sums, of_tokens, False)
            multiply(first, last, units, weights, groups, numbers, x[token:], width, sums)
            _turn(sums, of_tokens, True)
            found, target = of_tokens[: stop - token], y[token:stop, first:last]
            scale_rows(found, channel_scale, scales[token:stop], bias, target)

    return few


def _many(kind: str, tables: int) -> Any:
    """Some rows of the weight, decoded as FP32 a piece at a time, for so many tokens that MKL's
    product of what is in the cache takes less."""
    decode = avx2_kernels.decoding(kind, tables)
    unit_bytes, group_bytes = sizes(kind, tables)

    @numba.njit(nogil=True, error_model="numpy")
    def fill_piece(
        first: int,
        last: int,
        unit: int,
        stop: int,
        units: int,
        weights: int,
        groups: int,
        numbers: NDArray[np.int32],
        piece: NDArray[np.float32],  # [rows, columns], written
    ) -> None:
        row, of_row = units * unit_bytes, units * group_bytes
        decode(
            last - first, weights + first * row + unit * unit_bytes, row,
            groups + first * of_row + unit * group_bytes, of_row, stop - unit,
            piece.ctypes.data, 4 * piece.shape[1], numbers[3], numbers[4], numbers[5],
        )  # fmt: skip

    @numba.njit(nogil=True, error_model="numpy")
    def many(
        first: int,
        last: int,
        x: NDArray[np.float32],
        scales: NDArray[np.float32],
        numbers: NDArray[np.int32],
        weights: int,
        groups: int,
        channel_scale: NDArray[np.float32],
        bias: NDArray[np.float32],
        y: NDArray[np.int16],
    ) -> None:
        units, sizes = x.shape[1] // UNIT, np.empty(5, np.int32)
        piece = np.empty((_PIECE, min(units, _DEPTH) * UNIT), np.float32)
        sums = np.empty(min(len(y), _TOKENS) * _PIECE, np.float32)
        for token in range(0, len(y), _TOKENS):
            stop = min(token + _TOKENS, len(y))
            inputs, scale = x[token:stop], scales[token:stop]
            for row in range(first, last, _PIECE):
                end = min(row + _PIECE, last)
                found = sums[: len(inputs) * (end - row)].reshape(len(inputs), end - row)
                for unit in range(0, units, _DEPTH):
                    beyond = min(unit + _DEPTH, units)
                    fill_piece(row, end, unit, beyond, units, weights, groups, numbers, piece)
                    add_product(inputs, slice(unit * UNIT, beyond * UNIT), piece, found, sizes)
                some = slice(row - first, end - first)
                added = bias[some] if bias.size else bias
                scale_rows(found, channel_scale[some], scale, added, y[token:stop, row:end])

    return many


@numba.njit(nogil=True, error_model="numpy")
def _turn(sums: NDArray[np.float32], turned: NDArray[np.float32], to: bool) -> None:
    """Sums [rows, 8] → [8, rows], or set to zero."""
    for row in range(len(sums)):
        for token in range(LANES):
            if to:
                turned[token, row] = sums[row, token]
            else:
                sums[row, token] = 0


@numba.njit(nogil=True, error_model="numpy")
def _prepare(
    first: int,
    x: NDArray[np.int16],  # [tokens, in] bf16
    rounds: bool,
    static: float,  # sx, or 0 where each token has its own
    numbers: NDArray[np.int32],
    scales: NDArray[np.float32],  # [tokens, 1], written: sx
    wide: NDArray[np.float32],  # [tokens and more, in and more], written: x8, zero beyond
) -> None:
    """Of 8 tokens."""
    last, features = min(first + LANES, len(x)), x.shape[1]
    x8 = x[first:last]
    if rounds:
        maximum = real(numbers[0])
        choose_scales(x8, static, maximum, scales[first:last])
        x8 = np.empty_like(x8)
        round_rows(
            0, len(x8), x[first:last], scales[first:last], x8, maximum, numbers[1], numbers[2]
        )
    widen(x8, wide[first:last])
    for token in range(first, first + LANES):
        for column in range(features if token < last else 0, wide.shape[1]):
            wide[token, column] = 0
