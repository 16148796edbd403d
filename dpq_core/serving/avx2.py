"""The CPU runtime for AVX2: four-bit codes in memory, FP32 products.

`Avx2Linear` holds a weight as `dpq_core.serving.avx2_weights` lays it out. Threads share the rows
of the weight. A few tokens, rounded, as FP32, are multiplied by weights that are decoded in
registers; for more, a few rows at a time are decoded into the first cache, and multiplied by tiles
of tokens, as BF16 where the processor has units for that (`bf16_tiles`). Reading the codes takes a
seventh of what reading the weight in FP32 does.

As in `dpq_core.serving.cpu` rounding to E4M3 is part of decoding, and what lies beyond the
format's range is refused.
"""

import functools
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpq_core.kernels import products
from dpq_core.kernels.cpu import bits_of
from dpq_core.kernels.forward_rows import scale_rows, take_threads, widen
from dpq_core.kernels.numba_loops import real, round_rows
from dpq_core.layer.records import QuantizedLinear, QuantizedWeight
from dpq_core.serving import avx2_kernels
from dpq_core.serving.avx2_kernels import FP32_TILE, LANES, ROWS, WIDTHS, Tile, sizes
from dpq_core.serving.avx2_weights import code_bytes, eight_bits, group_tables
from dpq_core.serving.bf16_tiles import BF16_TILE
from dpq_core.serving.weights import UNIT, choose_scales, numbers_of, refusal, rows_of

__all__ = ["Avx2Linear", "make", "refusal", "unavailable"]

_INPUTS = 32  # units times tokens whose inputs stay in the first cache: 16 KiB
_FEW = 8  # tokens up to which weights are decoded in registers
_FEW_BESIDE_UNITS = 4  # where the processor multiplies BF16
_APART = 16  # columns between tokens, which would otherwise share places in the first cache
_BATCH = 4096  # tokens whose inputs are held as FP32
_TOGETHER = 24  # tokens that whole groups of 8, and whole tiles, are made of
_MANY = 132  # tokens at a time, whole tiles, whose inputs stay in a cache from piece to piece
_PIECE, _DEPTH = 64, 32  # rows, and units times bytes, that are decoded at a time: 256 KiB


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
    tables: Tensor
    channel_scale: Tensor  # [out] fp32
    bias: Tensor  # [out] fp32, or empty
    input_scale: Tensor | None  # fp32 scalar

    def __init__(self, layer: QuantizedLinear, bias: Tensor | None) -> None:
        super().__init__()
        assert not isinstance(layer.weight, Tensor)
        if isinstance(layer.weight, QuantizedWeight):
            grid = layer.weight.grid
            self.out_features, self.in_features = layer.weight.codes.shape
            weights = code_bytes(layer.weight.codes)
            groups, tables = group_tables(grid, self.in_features)
            kind, channel_scale = ("codes", max(1, UNIT // grid.group_size)), grid.channel_scale
        else:
            values = layer.weight.values
            self.out_features, self.in_features = values.shape
            weights, groups, tables = eight_bits(values), torch.zeros(0), torch.zeros(0)
            kind = ("e4m3" if values.dtype == torch.float8_e4m3fn else "int8", 1)
            channel_scale = layer.weight.channel_scale
        self.register_buffer("weights", weights)
        self.register_buffer("groups", groups)
        self.register_buffer("tables", tables)
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
        for first in range(0, len(rows), _BATCH):
            batch = slice(first, first + _BATCH)
            self._multiply(bits_of(rows)[batch], bits_of(y)[batch], threads)
        return y.view(*x.shape[:-1], self.out_features)

    def _multiply(self, x: NDArray[np.int16], y: NDArray[np.int16], threads: int) -> None:
        """x [tokens, in] bf16; y [tokens, out] bf16, written. Few operations: with one token and
        small layers they are what takes the time."""
        tensors, tokens = self._buffers, len(x)
        tile = _tile_for(tokens)
        each, number = (_TOGETHER, tile.number) if tile else (LANES, np.float32)
        filled, width = -(-tokens // each) * each, -(-self.in_features // UNIT) * UNIT
        static = tensors["input_scale"]
        _kernel(*self._kind, tile)(
            x,
            self._rounds,
            0.0 if static is None else float(static),
            self._numbers,
            tensors["weights"].data_ptr(),  # type: ignore[union-attr]
            tensors["groups"].data_ptr(),  # type: ignore[union-attr]
            tensors["tables"].data_ptr(),  # type: ignore[union-attr]
            tensors["channel_scale"].numpy(),  # type: ignore[union-attr]
            tensors["bias"].numpy(),  # type: ignore[union-attr]
            y,
            np.ones((tokens, 1), np.float32),
            np.empty((filled, width + _APART), number),
            threads,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._kind[0]}"


def _tile_for(tokens: int) -> Tile | None:
    """None: weights are decoded in registers."""
    if products.by_vectors():
        return BF16_TILE if tokens > _FEW_BESIDE_UNITS else None
    return FP32_TILE if tokens > _FEW else None


@functools.cache
def _kernel(kind: str, tables: int, tile: Tile | None) -> Any:
    """`Avx2Linear.forward` for one kind of weights; compiled when it first runs, in seconds."""
    multiply = _many(kind, tables, tile) if tile else _few(kind, tables)
    prepare = _preparing(_as_they_are if tile is BF16_TILE else widen)

    @numba.njit(nogil=True, parallel=True, error_model="numpy")
    def forward(
        x: NDArray[np.int16],  # [tokens, in] bf16
        rounds: bool,
        static: float,
        numbers: NDArray[np.int32],
        weights: int,
        groups: int,
        values: int,
        channel_scale: NDArray[np.float32],
        bias: NDArray[np.float32],
        y: NDArray[np.int16],  # [tokens, out] bf16, written
        scales: NDArray[np.float32],  # [tokens, 1], ones, written
        wide: NDArray[Any],  # [tokens and more, units * 128 and more] fp32 or bf16, written
        parts: int,
    ) -> None:
        rows = y.shape[1]
        if len(wide) <= LANES:
            prepare(0, x, rounds, static, numbers, scales, wide)
        else:
            for number in numba.prange(len(wide) // LANES):
                prepare(number * LANES, x, rounds, static, numbers, scales, wide)
        for part in numba.prange(parts):
            first, last = part * rows // parts, (part + 1) * rows // parts
            scaled = channel_scale[first:last], bias[first:last] if bias.size else bias
            multiply(first, last, wide, scales, weights, groups, values, *scaled, y)

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
        values: int,
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
            n = last - first
            if width == 1:
                one(n, weight, row, group, of_row, values, count, at, stride, to)
            elif width == 2:
                two(n, weight, row, group, of_row, values, count, at, stride, to)
            elif width == 4:
                four(n, weight, row, group, of_row, values, count, at, stride, to)
            else:
                eight(n, weight, row, group, of_row, values, count, at, stride, to)

    @numba.njit(nogil=True, error_model="numpy")
    def few(
        first: int,
        last: int,
        x: NDArray[np.float32],
        scales: NDArray[np.float32],
        weights: int,
        groups: int,
        values: int,
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
            multiply(first, last, units, weights, groups, values, x[token:], width, sums)
            _turn(sums, of_tokens, True)
            found, some = of_tokens[: stop - token], slice(token, stop)
            scale_rows(found, channel_scale, scales[some], bias, y[some], first)

    return few


def _many(kind: str, tables: int, tile: Tile) -> Any:
    """Some rows of the weight, decoded a piece at a time, which stays in the second cache."""
    decode, multiply = avx2_kernels.decoding(kind, tables, tile), avx2_kernels.tiling(tile)
    unit_bytes, group_bytes = sizes(kind, tables)
    number, size, together = tile.number, tile.size, tile.tokens
    deep, near = _DEPTH // size, 2 * together  # of tokens whose inputs stay in the first cache

    @numba.njit(nogil=True, error_model="numpy")
    def fill_piece(
        row: int,
        stop: int,
        unit: int,
        units: int,
        weights: int,
        groups: int,
        values: int,
        piece: NDArray[Any],  # [rows, columns], written
    ) -> None:
        of_row, of_groups, some = units * unit_bytes, units * group_bytes, min(deep, units - unit)
        decode(
            stop - row, weights + row * of_row + unit * unit_bytes, of_row,
            groups + row * of_groups + unit * group_bytes, of_groups, values, some,
            piece.ctypes.data, size * piece.shape[1],
        )  # fmt: skip

    @numba.njit(nogil=True, error_model="numpy")
    def add_products(
        x: NDArray[Any],  # [tokens, columns]: whole tiles
        unit: int,
        units: int,
        piece: NDArray[Any],  # [rows, columns]
        sums: NDArray[np.float32],  # [tokens, rows], added to
    ) -> None:
        """sums += x · pieceᵀ, of some units' columns of x."""
        stride, of_x, of_sums = size * piece.shape[1], size * x.shape[1], 4 * sums.shape[1]
        for token in range(0, len(x), near):
            tiles, inputs = min(near, len(x) - token) // together, x.ctypes.data + token * of_x
            found = sums.ctypes.data + token * of_sums
            for row in range(0, sums.shape[1], ROWS):
                multiply(
                    tiles, piece.ctypes.data + row * stride, stride, units,
                    inputs + size * UNIT * unit, of_x, found + 4 * row, of_sums,
                )  # fmt: skip

    @numba.njit(nogil=True, error_model="numpy")
    def many(
        first: int,
        last: int,
        x: NDArray[np.float32],
        scales: NDArray[np.float32],
        weights: int,
        groups: int,
        values: int,
        channel_scale: NDArray[np.float32],
        bias: NDArray[np.float32],
        y: NDArray[np.int16],
    ) -> None:
        units, memory = x.shape[1] // UNIT, np.empty(min(len(x), _MANY) * _PIECE, np.float32)
        piece = np.zeros((_PIECE, min(units, deep) * UNIT), number)
        for token in range(0, len(y), _MANY):
            stop = min(token + _MANY, len(y))
            filled = -(-(stop - token) // together) * together
            for row in range(first, last, _PIECE):
                end = min(row + _PIECE, last)
                wide = -(-(end - row) // ROWS) * ROWS
                sums = memory[: filled * wide].reshape(filled, wide)
                sums[:] = 0
                for unit in range(0, units, deep):
                    fill_piece(row, end, unit, units, weights, groups, values, piece)
                    inputs, depth = x[token : token + filled], min(deep, units - unit)
                    add_products(inputs, unit, depth, piece, sums)
                found, some = sums[: stop - token], slice(row - first, end - first)
                added, target = bias[some] if bias.size else bias, y[token:stop]
                scale_rows(found, channel_scale[some], scales[token:stop], added, target, row)

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


def _preparing(lay_out: Any) -> Any:
    @numba.njit(nogil=True, error_model="numpy")
    def prepare(
        first: int,
        x: NDArray[np.int16],  # [tokens, in] bf16
        rounds: bool,
        static: float,  # sx, or 0 where each token has its own
        numbers: NDArray[np.int32],
        scales: NDArray[np.float32],  # [tokens, 1], written: sx
        wide: NDArray[Any],  # [tokens and more, in and more], written: x8, zero beyond
    ) -> None:
        """Round 8 tokens' inputs and lay them out."""
        last, features = min(first + LANES, len(x)), x.shape[1]
        x8 = x[first:last]
        if rounds:
            maximum = real(numbers[0])
            choose_scales(x8, static, maximum, scales[first:last])
            x8 = np.empty_like(x8)
            round_rows(
                0, len(x8), x[first:last], scales[first:last], x8, maximum, numbers[1], numbers[2]
            )
        lay_out(x8, wide[first:last])
        for token in range(first, first + LANES):
            for column in range(features if token < last else 0, wide.shape[1]):
                wide[token, column] = 0

    return prepare


@numba.njit(error_model="numpy")
def _as_they_are(values: NDArray[np.int16], wide: NDArray[np.int16]) -> None:
    """Into rows that are longer."""
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            wide[row, column] = values[row, column]
