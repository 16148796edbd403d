"""Micro-kernels of the CPU runtime: decode a panel of weights, multiply it, scale it.

They work on Intel's tile registers (AMX): a tile has 16 rows of 64 bytes, and one instruction adds
the product of two tiles of BF16, 16 x 32 and 32 x 16, to a tile of FP32. A panel is 16 rows of the
weight, a unit 128 of its columns:

    decode    a table of the 16 values that a group's codes stand for, in BF16, is made in one
              register; a byte permutation's sibling for words (vpermw) looks 32 codes up at once
    multiply  weights on the left, as they are decoded; tokens on the right, in pairs of columns
    scale     sums are transposed in registers; y = sums * s8 * sx + bias, in BF16

BF16 holds each 8-bit value, so that the products are exact and sums FP32's: the arithmetic of
`W4A8Linear`, in another order. Nothing of the weight but its codes and scales is read from memory,
eight units ahead (4.5 bits a weight at 128 a group), and nothing decoded leaves the first cache.
Decoding is bound by the two vector ports, by 14 operations for 128 codes, 7 of them the table; the
products of the unit before run beside it. What that takes is in docs/log.md.

The kernels are LLVM's language, written through llvmlite, inside functions that Numba compiles:
neither has words for these instructions. Sources: Intel's Architecture Instruction Set Extensions
reference (AMX, AVX512_BF16); LLVM's intrinsics of the same names.
"""

import functools
from collections.abc import Callable
from typing import Any

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
    Rounding,
    at,
    call,
    fill,
    load,
    pick,
    prefetch,
    splat,
    store,
)

PANEL, UNIT, TILE = 16, 128, 1024  # rows; columns; bytes
CONFIG_BYTES = 64
SCRATCH = 2 * 4 * TILE  # bytes: a unit of a panel, decoded, twice


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_WORDS, _BYTES = ir.VectorType(I16, 32), ir.VectorType(I8, 16)
_REALS, _INTEGERS = ir.VectorType(F32, 16), ir.VectorType(I32, 16)
_BFLOATS = ir.VectorType(_BFloat(), 16)

_UPPER = -0x10000  # of the two words in 32 bits
_LEFT, _RIGHT, _SUMS = (0, 1), (2, 3), (4, 5, 6, 7)  # tile registers
MOST_TILES = len(_SUMS)  # of tokens at a time
_AHEAD = 8192  # bytes of codes that are on their way from memory: a fifth less time from there


def tile_config() -> bytes:
    """The configuration of all eight registers: 16 rows of 64 bytes each."""
    return bytes([1, 0, *[0] * 14, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])


def _transposed(b: Builder, rows: list[Any]) -> list[Any]:
    """16 registers of 16 lanes, transposed: lanes of registers `distance` apart change places."""
    for distance in (1, 2, 4, 8):
        lower = [lane for lane in range(16) if not lane & distance]
        first = [lane if lane in lower else lane - distance + 16 for lane in range(16)]
        second = [lane + distance if lane in lower else lane + 16 for lane in range(16)]
        for row in lower:
            low, high = rows[row], rows[row + distance]
            rows[row] = pick(b, low, high, first)
            rows[row + distance] = pick(b, low, high, second)
    return rows


@intrinsic
def open_tiles(_: Any, config: Any, before: Any) -> Any:
    """Configure this thread's tile registers; their configuration until now goes to `before`."""

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        config, before = arguments
        call(b, "x86.sttilecfg", ir.VoidType(), at(b, before, 0, I8))
        call(b, "x86.ldtilecfg", ir.VoidType(), at(b, config, 0, I8))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def close_tiles(_: Any, before: Any) -> Any:
    """Back to what `open_tiles` found: other libraries of this thread rely on theirs."""

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        call(b, "x86.ldtilecfg", ir.VoidType(), at(b, arguments[0], 0, I8))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def pack(_: Any, x: Any, stride: Any, last: Any, columns: Any, tile: Any) -> Any:
    """Write a tile of 16 tokens x 32 columns.

    x (BF16), from its first column on, and its stride in bytes; the last token there is, which
    stands in for those beyond it; how many columns there are, and where to.
    """

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        x, stride, last, columns, tile = arguments
        lanes = ir.Constant(ir.VectorType(I32, 32), list(range(32)))
        there = b.icmp_signed("<", lanes, splat(b, b.trunc(columns, I32), lanes.type))
        rows = []
        for number in range(PANEL):
            source = at(b, x, b.mul(_token(b, I64(0), number, last), stride), _WORDS)
            arguments = source, I32(1), there, fill(_WORDS, 0)
            words = call(b, "masked.load.v32i16.p0", _WORDS, *arguments)
            rows.append(b.bitcast(words, _INTEGERS))
        for number, row in enumerate(_transposed(b, rows)):
            store(b, row, tile, 64 * number)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _token(b: Builder, first: Any, number: int, last: Any) -> Any:
    """The token after `first`, or the last: what stands in for it has its values, and is written
    to its place."""
    token = b.add(first, I64(number))
    return b.select(b.icmp_signed("<", token, last), token, last)


def _paired(b: Builder, even: Any, odd: Any) -> Any:
    """Two registers of FP32 whose lower halves are zero, as pairs of BF16."""
    low = b.lshr(b.bitcast(even, _INTEGERS), fill(_INTEGERS, 16))
    return b.or_(low, b.and_(b.bitcast(odd, _INTEGERS), fill(_INTEGERS, _UPPER)))


def _looked_up(b: Builder, weights: Any, groups: Any, tables: int, rounding: Rounding) -> Any:
    """128 four-bit codes as four registers of 32 BF16. A word's nibbles are columns 32 apart.
    groups: of each, s4 and -s4 * z in FP32."""
    codes = ir.Constant(_REALS, [float(code) for code in range(16)])
    made = []
    for table in range(tables):
        scale, zero = (
            splat(b, load(b, groups, 8 * PANEL * table + place, F32), _REALS) for place in (0, 4)
        )
        values = call(b, "fma.v16f32", _REALS, scale, codes, zero)  # exact: 13 bits at most
        values = rounding.nearest(b, values)
        upper = [2 * (lane % 16) + 1 for lane in range(32)]  # the values in BF16, twice
        words = b.bitcast(values, _WORDS)
        made.append(pick(b, words, words, upper))
    words = load(b, weights, 0, _WORDS)
    for part in range(4):  # vpermw takes five bits of each word: the table is there twice
        shifted = b.lshr(words, fill(_WORDS, 4 * part)) if part else words
        name = "x86.avx512.permvar.hi.512"
        yield call(b, name, _WORDS, made[part * tables // 4], shifted)


def _widened(b: Builder, weights: Any, is_float: bool) -> Any:
    """128 E4M3 or INT8 numbers as four registers of 32 BF16. In each 32 the even columns come
    first."""
    for part in range(4):
        halves = []
        for half in range(2):
            numbers = b.sext(load(b, weights, 32 * part + 16 * half, _BYTES), _INTEGERS)
            if is_float:
                # As `formats` decodes: moved to FP32's places, biases made up for.
                places = b.shl(numbers, fill(_INTEGERS, 20))
                places = b.and_(places, fill(_INTEGERS, -(1 << 31) | 0x7F << 20))
                reals = b.fmul(b.bitcast(places, _REALS), fill(_REALS, 2.0**120))
            else:
                reals = b.sitofp(numbers, _REALS)
            halves.append(reals)
        yield b.bitcast(_paired(b, *halves), _WORDS)


def multiplying(kind: str, tables: int) -> Any:
    """Kernel that multiplies a panel with some tiles of 16 tokens, and scales.

    Arguments: how many tiles; the panel's weights and groups, and its units; the tokens' tiles, and
    the bytes from one 16 to the next; scratch; a rounding's three; channel scales and bias (FP32)
    of the panel, how many of its rows there are; token scales (FP32), first and last token; y
    (BF16) and its stride.

    Args:
        kind: of weights: `codes`, `e4m3` or `int8`.
        tables: groups a unit, for codes.
    """

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        tiles, panel, groups, units, x, tile_stride, scratch, *more = arguments
        rounding, more = Rounding(b, PANEL, *more[:3]), more[3:]

        def decode(index: Any, buffer: Any, quarter: int) -> None:
            """Four rows of a unit of the panel, into four tiles."""
            row_bytes = 64 if kind == "codes" else 128
            source = b.add(panel, b.mul(index, I64(PANEL * row_bytes)))
            group = b.add(groups, b.mul(index, I64(8 * PANEL * tables)))
            for row in range(4 * quarter, 4 * quarter + 4):
                row_at, of_row = b.add(source, I64(row_bytes * row)), b.add(group, I64(8 * row))
                for line in range(0, row_bytes, 64):
                    prefetch(b, row_at, _AHEAD + line)
                if kind == "codes":
                    parts = _looked_up(b, row_at, of_row, tables, rounding)
                else:
                    parts = _widened(b, row_at, kind == "e4m3")
                for part, decoded in enumerate(parts):
                    store(b, decoded, buffer, TILE * part + 64 * row)

        for count in range(1, MOST_TILES + 1):
            with b.if_then(b.icmp_signed("==", tiles, I64(count))):
                _multiply(b, count, units, x, tile_stride, scratch, decode)
                _add_up(b, count, scratch)
        with cgutils.for_range(b, tiles) as loop:
            _write(b, loop.index, scratch, *more)
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * 7, *[types.int32] * 3, *[types.int64] * 8)

    @intrinsic
    def multiply(
        _: Any, tiles: Any, panel: Any, groups: Any, units: Any, x: Any, tile_stride: Any,
        scratch: Any, mask: Any, lowest: Any, steps: Any, channel_scale: Any,
        bias: Any, rows: Any, scales: Any, token: Any, last: Any, y: Any, stride: Any,
    ) -> Any:  # fmt: skip
        return signature, generate

    return multiply


def _multiply(
    b: Builder, tiles: int, units: Any, x: Any, tile_stride: Any, scratch: Any,
    decode: Callable[[Any, Any, int], None],
) -> None:  # fmt: skip
    """Sums of a panel and some tiles of tokens, in their registers: `_registers` of each.

    A unit is decoded while the one before is multiplied: what was just stored is not yet in the
    cache. Each product waits for the one before it in the same register, for three times as long
    as it takes, so that few tokens have several.
    """
    for tile in range(tiles):
        for register in _registers(tile, tiles):
            call(b, "x86.tilezero", ir.VoidType(), I8(register))
    for quarter in range(4):
        decode(I64(0), scratch, quarter)
    with cgutils.for_range(b, units) as loop:
        index = loop.index
        following = b.add(index, I64(1))
        following = b.select(b.icmp_signed("<", following, units), following, index)
        there, here = (_buffer(b, scratch, number) for number in (b.add(index, I64(1)), index))
        for part in range(4):
            decode(following, there, part)
            left = I8(_LEFT[part % 2])
            _tile_load(b, left, here, TILE * part)
            for tile in range(tiles):
                registers = _registers(tile, tiles)
                right, sums = I8(_RIGHT[tile % 2]), I8(registers[part % len(registers)])
                before = b.add(b.mul(tile_stride, I64(tile)), I64(TILE * part))
                _tile_load(b, right, x, b.add(before, b.mul(index, I64(4 * TILE))))
                call(b, "x86.tdpbf16ps", ir.VoidType(), sums, left, right)


def _buffer(b: Builder, scratch: Any, index: Any) -> Any:
    """Where a unit is decoded to: one of two places in turn."""
    return b.add(scratch, b.mul(b.and_(index, I64(1)), I64(4 * TILE)))


def _registers(tile: int, tiles: int) -> tuple[int, ...]:
    """That hold the sums of one of some tiles of tokens."""
    shares = MOST_TILES // tiles
    return _SUMS[tile * shares : (tile + 1) * shares]


def _add_up(b: Builder, tiles: int, scratch: Any) -> None:
    """Sums of each tile, from its registers to its place in scratch."""
    for tile in range(tiles):
        registers = _registers(tile, tiles)
        places = [tile + tiles * share for share in range(len(registers))]
        for place, register in zip(places, registers, strict=True):
            pointer = at(b, scratch, TILE * place, I8)
            call(b, "x86.tilestored64", ir.VoidType(), I8(register), pointer, I64(64))
        for row in range(PANEL if len(registers) > 1 else 0):
            parts = [load(b, scratch, TILE * place + 64 * row, _REALS) for place in places]
            store(b, functools.reduce(b.fadd, parts), scratch, TILE * tile + 64 * row)


def _tile_load(b: Builder, register: Any, address: Any, offset: Any) -> None:
    call(b, "x86.tileloadd64", ir.VoidType(), register, at(b, address, offset, I8), I64(64))


def _write(
    b: Builder, tile: Any, scratch: Any, channel_scale: Any, bias: Any, rows: Any, scales: Any,
    first: Any, last: Any, y: Any, stride: Any,
) -> None:  # fmt: skip
    """y of a panel and the tokens of a tile, from its sums in scratch."""
    place = b.add(scratch, b.mul(tile, I64(TILE)))
    sums = [load(b, place, 64 * row, _REALS) for row in range(PANEL)]
    first = b.add(first, b.mul(tile, I64(PANEL)))
    of_row = load(b, channel_scale, 0, _REALS)
    added = load(b, bias, 0, _REALS)
    lanes = ir.Constant(_INTEGERS, list(range(PANEL)))
    there = b.icmp_signed("<", lanes, splat(b, b.trunc(rows, I32), _INTEGERS))
    for number, values in enumerate(_transposed(b, sums)):
        token = _token(b, first, number, last)
        scale = splat(b, load(b, scales, b.shl(token, I64(2)), F32), _REALS)
        scaled = b.fadd(b.fmul(b.fmul(values, of_row), scale), added)
        rounded = b.fptrunc(scaled, _BFLOATS)
        target = at(b, y, b.mul(token, stride), _BFLOATS)
        name = "masked.store.v16bf16.p0"
        call(b, name, ir.VoidType(), rounded, target, I32(1), there)
