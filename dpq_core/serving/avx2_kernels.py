"""Micro-kernel of the CPU runtime for AVX2: decode a row of weights in registers, multiply it.

A row is a run of units of 128 columns. A unit of four-bit codes is 64 bytes, one line of the cache:

    decode    the 16 values that a group's codes stand for, in BF16, are two tables of 16 bytes,
              made when the layer is; a byte shuffle (vpshufb) looks 32 codes up in each, unpacking
              joins their bytes
    multiply  BF16 is the upper half of FP32: a shift and a mask give 8 weights each, multiplied by
              the inputs (FP32, as they are rounded) of up to 8 tokens, and added (FMA)
    add up    the lanes of each token's sums, which are added to what earlier columns gave

For more tokens 4 rows are decoded into the first cache, and multiplied from there (`tiling`).

BF16 holds each 8-bit value, so that the products are exact and sums FP32's: the arithmetic of
`W4A8Linear`, in another order. Decoding 32 codes and multiplying them by one token takes 14
operations; with one token that, and not memory, is what takes the time.

Sources: Intel's Intrinsics Guide (AVX2, FMA); LLVM's intrinsics of the same names.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dpq_core.kernels.llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    Builder,
    call,
    compiled,
    fill,
    load,
    pick,
    prefetch,
    store,
)
from dpq_core.serving.weights import UNIT

LANES = 8  # numbers of a register
ROWS = 4  # of a tile
WIDTHS = (1, 2, 4, 8)  # tokens at a time that there are kernels for
_PART = 32  # columns that are looked up at once
_STEPS = 4  # registers of a row between two jumps, where tiles are multiplied
_AHEAD = 4096  # bytes of weights that are on their way from memory

REALS, INTEGERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_WORDS, _BYTES, _EIGHT = ir.VectorType(I16, 16), ir.VectorType(I8, 32), ir.VectorType(I8, LANES)

# Unpacking joins bytes within halves of a register, 16 at a time; then the even words are one
# register of FP32, the odd ones the next. So byte b of 32 codes is this column of its part.
_OF_UNPACKED = [*range(0, 8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
COLUMN_OF_BYTE = [0] * _PART
for _half, _order in enumerate(_OF_UNPACKED):
    for _place, _byte in enumerate(_order):
        COLUMN_OF_BYTE[_byte] = 16 * _half + 8 * (_place % 2) + _place // 2


@dataclass(frozen=True, eq=False)
class Tile:
    """How rows of the weight are multiplied by many tokens. tokens: at a time. number: type of what
    is multiplied, in NumPy. inputs, sums: registers of that, and of FP32."""

    tokens: int
    number: type[np.generic]
    inputs: ir.VectorType
    sums: ir.VectorType
    stored: Callable[[Builder, Any], Any]  # 8 weights in FP32, as `number`
    add_products: Callable[[Builder, Any, Any, Any], Any]  # of weights and inputs, to sums
    in_lanes: Callable[[Builder, Any], Any]  # sums as 8 of them

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return np.dtype(self.number).itemsize


def multiplying(kind: str, tables: int, width: int) -> Any:
    """Kernel that adds products of rows of the weight and some tokens to their sums.

    Arguments: how many rows; their weights and groups at the first unit, and the bytes from a row
    to the next of each; the layer's tables; units; the tokens' inputs (FP32) at the first unit, and
    the bytes from a token to the next; sums [rows, 8] (FP32).

    Args:
        kind: of weights: `codes`, `e4m3` or `int8`.
        tables: groups a unit, for codes.
        width: tokens, one of `WIDTHS`.
    """
    unit_bytes, _ = sizes(kind, tables)
    each = min(4, LANES // width)  # sums of a token: a product waits for the one before in its sum

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        rows, weights, weight_stride, groups, group_stride, values, units, x, x_stride, sums = (
            arguments
        )
        tokens = [b.add(x, b.mul(x_stride, I64(token))) for token in range(width)]
        beyond = _beyond(b, weight_stride)
        with cgutils.for_range(b, rows) as loop:
            row = b.add(weights, b.mul(weight_stride, loop.index))
            of_row = b.add(groups, b.mul(group_stride, loop.index))
            ahead = b.add(row, beyond)
            totals = [[_zero(b) for _ in range(each)] for _ in tokens]
            with cgutils.for_range(b, units) as unit:
                column = b.mul(unit.index, I64(4 * UNIT))
                decoded = _decoded(b, kind, tables, row, of_row, values, unit.index)
                _prefetch_unit(b, b.add(ahead, b.mul(unit.index, I64(unit_bytes))), unit_bytes)
                for number, weight in enumerate(decoded):
                    for token, total in zip(tokens, totals, strict=True):
                        inputs = load(b, b.add(token, column), 4 * LANES * number, REALS)
                        sum_ = total[number % each]
                        b.store(_fma(b, weight, inputs, b.load(sum_)), sum_)
            place = b.add(sums, b.mul(loop.index, I64(4 * LANES)))
            added = _added_up(b, [_total(b, total) for total in totals])
            store(b, b.fadd(load(b, place, 0, REALS), added), place, 0)
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * 10)

    @intrinsic
    def multiply(
        _: Any, rows: Any, weights: Any, weight_stride: Any, groups: Any, group_stride: Any,
        values: Any, units: Any, x: Any, x_stride: Any, sums: Any,
    ) -> Any:  # fmt: skip
        return signature, generate

    return compiled(
        signature, lambda a, b, c, d, e, f, g, h, i, j: multiply(a, b, c, d, e, f, g, h, i, j)
    )


def decoding(kind: str, tables: int, tile: Tile) -> Any:
    """Kernel that writes rows of the weight in a tile's type, in their own order.

    Arguments: the first seven of `multiplying`; where to, and the bytes from a row to the next
    there.
    """

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        rows, weights, weight_stride, groups, group_stride, values, units, target, stride = (
            arguments
        )
        unit_bytes, beyond = sizes(kind, tables)[0], _beyond(b, weight_stride)
        with cgutils.for_range(b, rows) as loop:
            row = b.add(weights, b.mul(weight_stride, loop.index))
            of_row = b.add(groups, b.mul(group_stride, loop.index))
            to_row = b.add(target, b.mul(stride, loop.index))
            with cgutils.for_range(b, units) as unit:
                decoded = _decoded(b, kind, tables, row, of_row, values, unit.index)
                ahead = b.add(b.add(row, beyond), b.mul(unit.index, I64(unit_bytes)))
                _prefetch_unit(b, ahead, unit_bytes)
                place = b.add(to_row, b.mul(unit.index, I64(tile.size * UNIT)))
                for number, weight in enumerate(decoded):
                    store(b, tile.stored(b, weight), place, tile.size * LANES * number)
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * 9)

    @intrinsic
    def decode(
        _: Any, rows: Any, weights: Any, weight_stride: Any, groups: Any, group_stride: Any,
        values: Any, units: Any, target: Any, stride: Any,
    ) -> Any:  # fmt: skip
        return signature, generate

    return compiled(signature, lambda a, b, c, d, e, f, g, h, i: decode(a, b, c, d, e, f, g, h, i))


def tiling(tile: Tile) -> Any:
    """Kernel that adds products of `ROWS` decoded rows and some tokens to their sums, a tile at a
    time.

    Arguments: tiles of tokens; the rows (in the tile's type), and the bytes from a row to the next;
    units; the tokens' inputs (as the rows), and the bytes from a token to the next; sums [tokens,
    rows] (FP32) at the first row, and the bytes from a token to the next.
    """
    register = tile.size * tile.inputs.count  # bytes

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        tiles, rows, row_stride, units, x, x_stride, sums, sums_stride = arguments
        count = b.mul(units, I64(UNIT // tile.inputs.count // _STEPS))
        with cgutils.for_range(b, tiles) as loop:
            first = b.mul(loop.index, I64(tile.tokens))
            numbers = [b.add(first, I64(token)) for token in range(tile.tokens)]
            tokens = [b.add(x, b.mul(x_stride, number)) for number in numbers]
            totals = [[_zero(b, tile.sums) for _ in range(ROWS)] for _ in tokens]
            with cgutils.for_range(b, count) as step:
                for part in range(_STEPS):
                    at = b.add(b.mul(step.index, I64(register * _STEPS)), I64(register * part))
                    inputs = [load(b, token, at, tile.inputs) for token in tokens]
                    for row in range(ROWS):
                        weight = load(b, b.add(rows, b.mul(row_stride, I64(row))), at, tile.inputs)
                        for given, total in zip(inputs, totals, strict=True):
                            added = tile.add_products(b, weight, given, b.load(total[row]))
                            b.store(added, total[row])
            for number, total in zip(numbers, totals, strict=True):
                lanes = _added_up(b, [tile.in_lanes(b, b.load(each)) for each in total])
                added = pick(b, lanes, lanes, range(ROWS))
                place = b.add(sums, b.mul(sums_stride, number))
                store(b, b.fadd(load(b, place, 0, added.type), added), place, 0)
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * 8)

    @intrinsic
    def multiply(
        _: Any, tiles: Any, rows: Any, row_stride: Any, units: Any, x: Any, x_stride: Any,
        sums: Any, sums_stride: Any,
    ) -> Any:  # fmt: skip
        return signature, generate

    return compiled(signature, lambda a, b, c, d, e, f, g, h: multiply(a, b, c, d, e, f, g, h))


def _decoded(
    b: Builder, kind: str, tables: int, row: Any, of_row: Any, values: Any, unit: Any
) -> Iterator[Any]:
    """A unit of a row as 16 registers of FP32."""
    unit_bytes, group_bytes = sizes(kind, tables)
    weights = b.add(row, b.mul(unit, I64(unit_bytes)))
    if kind == "codes":
        group = b.add(of_row, b.mul(unit, I64(group_bytes)))
        return _looked_up(b, weights, group, values, tables)
    return _widened(b, weights, kind == "e4m3")


def _beyond(b: Builder, stride: Any) -> Any:
    """Bytes from a row to a later one, some thousand bytes ahead: blocks of columns are strided,
    and what comes next is the same columns of other rows."""
    return b.mul(stride, b.add(I64(1), b.udiv(I64(_AHEAD), stride)))


def _prefetch_unit(b: Builder, address: Any, unit_bytes: int) -> None:
    for line in range(0, unit_bytes, 64):
        prefetch(b, address, line)


def sizes(kind: str, tables: int) -> tuple[int, int]:
    """Bytes of a unit's weights, and of its groups."""
    return (UNIT // 2, 4 * tables) if kind == "codes" else (UNIT, 0)


def _zero(b: Builder, sums: ir.VectorType = REALS) -> Any:
    variable = cgutils.alloca_once(b, sums)
    b.store(fill(sums, 0), variable)
    return variable


def _fma(b: Builder, left: Any, right: Any, added: Any) -> Any:
    return call(b, "fma.v8f32", REALS, left, right, added)


def _tables(b: Builder, group: Any, values: Any) -> tuple[Any, Any]:
    """Lower and upper bytes of the 16 values that codes of a group stand for, each twice. group:
    which bytes of the layer's tables they begin at."""
    table = b.add(values, b.zext(load(b, group, 0, I32), I64))
    halves = [load(b, table, place, ir.VectorType(I8, 16)) for place in (0, 16)]
    low, high = (pick(b, half, half, [*range(16)] * 2) for half in halves)
    return low, high


def _looked_up(b: Builder, weights: Any, groups: Any, values: Any, tables: int) -> Iterator[Any]:
    """128 four-bit codes as 16 registers of FP32. A byte's nibbles are columns 32 apart."""
    made = [_tables(b, b.add(groups, I64(4 * table)), values) for table in range(tables)]
    for part in range(UNIT // _PART):
        codes = load(b, weights, _PART * (part // 2), _BYTES)
        if part % 2:
            shifted = b.lshr(b.bitcast(codes, _WORDS), fill(_WORDS, 4))
            codes = b.bitcast(shifted, _BYTES)
        codes = b.and_(codes, fill(_BYTES, 15))
        low, high = (
            call(b, "x86.avx2.pshuf.b", _BYTES, table, codes) for table in made[part * tables // 4]
        )
        for order in _OF_UNPACKED:
            words = pick(b, low, high, [lane for byte in order for lane in (byte, byte + 32)])
            pairs = b.bitcast(words, INTEGERS)
            yield b.bitcast(b.shl(pairs, fill(INTEGERS, 16)), REALS)
            yield b.bitcast(b.and_(pairs, fill(INTEGERS, -0x10000)), REALS)


def _widened(b: Builder, weights: Any, is_float: bool) -> Iterator[Any]:
    """128 E4M3 or INT8 numbers as 16 registers of FP32."""
    for first in range(0, UNIT, LANES):
        numbers = b.sext(load(b, weights, first, _EIGHT), INTEGERS)
        if is_float:
            # As `formats` decodes: moved to FP32's places, biases made up for.
            places = b.shl(numbers, fill(INTEGERS, 20))
            places = b.and_(places, fill(INTEGERS, -(1 << 31) | 0x7F << 20))
            yield b.fmul(b.bitcast(places, REALS), fill(REALS, 2.0**120))
        else:
            yield b.sitofp(numbers, REALS)


def _total(b: Builder, sums: list[Any]) -> Any:
    first, *others = [b.load(each) for each in sums]
    for other in others:
        first = b.fadd(first, other)
    return first


def _added_up(b: Builder, totals: list[Any]) -> Any:
    """The lanes of up to 8 registers added up: a lane each, zero beyond."""
    rows = totals + [fill(REALS, 0)] * (LANES - len(totals))
    even, odd = range(0, 2 * LANES, 2), range(1, 2 * LANES, 2)
    while len(rows) > 1:
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [b.fadd(pick(b, low, high, even), pick(b, low, high, odd)) for low, high in pairs]
    return rows[0]


# 12 sums, 3 inputs and a weight are the 16 registers.
FP32_TILE = Tile(3, np.float32, REALS, REALS, lambda _, reals: reals, _fma, lambda _, sums: sums)
