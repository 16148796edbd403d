"""Attention on a CPU of queries that each see some of the keys: trees of shared prefixes.

    y[q] = Σ_k exp(s[q, k] − m[q]) · v[k] / Σ_k exp(s[q, k] − m[q])      s = scale · q · k
                                                                           m: largest s of a query

over the keys that a query sees. A tile is 16 queries that lie side by side, the lanes of the vector
units; the keys that any of them sees are written down beforehand with a bit a lane (`Seen`), and no
others are multiplied. Torch's own product takes a mask, and multiplies what that hides.

    products   a key a row: its numbers are broadcast, a fused multiply-add a dimension; four keys
               at a time, whose numbers meet the same 16 queries'
    exp        2ⁿ · eʳ, r in ± ln 2 / 2, eʳ by a polynomial of degree 6: within 2.2e-7 of it
    values     as products, some dimensions at a time, whose sums stay in registers

All in FP32, each query's sums in the order of its keys: the same bits for any tile that it lies in,
any number of threads and any vector units with fused multiply-add.

Source of the polynomial: exp's Taylor series at 0, whose error on ± ln 2 / 2 is 1.2e-7 of it.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from dpq_core.kernels.llvm import (
    BIT,
    F32,
    I16,
    I32,
    I64,
    Builder,
    call,
    compiled,
    fill,
    load,
    splat,
    store,
)
from dpq_core.kernels.products import features
from dpq_core.kernels.threads import in_ranges

LANES = 16  # queries of a tile
AT_ONCE = 4  # keys
_UNIT = 8  # dimensions of a head come in such
_REALS, _INTEGERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_LINE = 4 * LANES  # bytes
_TILES = types.void(*[types.int64] * 4)
_LOWEST = -87.0  # of an exponent: below it FP32 has no normal numbers
_WHOLE = 1.5 * 2**23  # added and taken away it leaves a whole number
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2, the first has 10 bits


@dataclass(frozen=True, eq=False)
class Seen:
    """The keys that tiles of queries see.

    starts: [tiles + 1] int64, of a tile's in the other two. keys: [n] int32, ascending in a tile,
    in multiples of `AT_ONCE`, filled up with a tile's first. lanes: [n] int32: bit b says that the
    tile's query b sees the key.
    """

    starts: NDArray[np.int64]
    keys: NDArray[np.int32]
    lanes: NDArray[np.int32]

    @classmethod
    def of(cls, seen: NDArray[np.bool_]) -> "Seen":
        """From [keys, queries], which queries see each key: all see at least one."""
        tiles = -(-seen.shape[1] // LANES)
        if missing := tiles * LANES - seen.shape[1]:
            seen = np.pad(seen, ((0, 0), (0, missing)))
        lanes = np.packbits(seen, axis=1, bitorder="little").view("<u2").T  # [tiles, keys]
        tile, keys = lanes.nonzero()
        counts = np.bincount(tile, minlength=tiles)
        starts = np.zeros(tiles + 1, np.int64)
        np.cumsum(-(-counts // AT_ONCE) * AT_ONCE, out=starts[1:])
        first = np.cumsum(counts) - counts
        place = starts[tile] + np.arange(len(tile)) - first[tile]
        found = cls(
            starts,
            np.repeat(keys[first].astype(np.int32), np.diff(starts)),
            np.zeros(starts[-1], np.int32),
        )
        found.keys[place], found.lanes[place] = keys, lanes[tile, keys]
        return found


def attend(
    query: Tensor,  # [heads, queries, size]
    key: Tensor,  # [key heads, keys, size]
    value: Tensor,  # [key heads, keys, size of a value]
    seen: Seen,
    scale: float,
) -> Tensor:
    """[queries, heads, size of a value] in the queries' type, from operands widened to FP32."""
    (heads, queries, _), tiles = query.shape, len(seen.starts) - 1
    given, keys, values = (_in_units(each) for each in (query, key, value))
    size, width = given.shape[2], values.shape[2]
    y = given.new_empty(tiles * LANES, heads, width)
    numbers = np.array([
        tiles, queries, heads, heads // len(keys), keys.shape[1], size, width,
        np.float32(scale).view(np.int32),
        *(each.data_ptr() for each in (given, keys, values, y)),
        *(each.ctypes.data for each in (seen.starts, seen.keys, seen.lanes)),
    ])  # fmt: skip
    lines = size + width + int(np.diff(seen.starts).max())
    kernel = _kernel()

    def some(first: int, last: int) -> None:
        scratch = np.empty(lines * LANES, np.float32)
        kernel(first, last, numbers.ctypes.data, scratch.ctypes.data)

    in_ranges(some, heads * tiles)
    return y[:queries, :, : value.shape[2]].to(query.dtype)


def _in_units(x: Tensor) -> Tensor:
    """FP32, its last dimension filled up with zeros, in one piece."""
    return pad(x.float(), (0, -x.shape[-1] % _UNIT)).contiguous()


@functools.cache
def _kernel() -> Any:
    """Compiled when it is first asked for, a sixth of a second. Calls hold no lock of Python's."""
    return compiled(_TILES, lambda a, b, c, d: _attend_tiles(a, b, c, d))


@intrinsic
def _attend_tiles(_: Any, first: Any, last: Any, numbers: Any, scratch: Any) -> Any:
    """Tasks first … last − 1, a head's tiles one after the other.

    Addresses of scratch and of int64 numbers: tiles and queries of a head, heads, those that share
    one of keys, keys of a head, numbers of a key and of a value, the scale's bits; addresses of
    queries, keys, values, what comes out [tiles · LANES, heads, width], and the three of a `Seen`.
    """

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        first, last, numbers, scratch = arguments
        (tiles, queries, heads, group, length, size, width, scale,
         query, key, value, y, starts, keys, lanes) = (
            load(b, numbers, 8 * place, I64) for place in range(15)
        )  # fmt: skip
        scale = splat(b, b.bitcast(b.trunc(scale, I32), F32), _REALS)
        given = scratch
        found = b.add(given, b.mul(size, I64(_LINE)))
        scores = b.add(found, b.mul(width, I64(_LINE)))
        row, out = b.mul(size, I64(4)), b.mul(width, I64(4))
        with cgutils.for_range(b, b.sub(last, first)) as loop:
            task = b.add(first, loop.index)
            head, tile = b.udiv(task, tiles), b.urem(task, tiles)
            at = b.mul(tile, I64(LANES))
            begin = load(b, starts, b.mul(tile, I64(8)), I64)
            count = b.sub(load(b, starts, b.mul(b.add(tile, I64(1)), I64(8)), I64), begin)
            listed, bits = (b.add(each, b.mul(begin, I64(4))) for each in (keys, lanes))
            own = b.mul(b.udiv(head, group), length)
            final, rows = b.sub(queries, I64(1)), []
            for lane in range(LANES):  # the last query stands in for those beyond
                place = b.add(at, I64(lane))
                place = b.select(b.icmp_signed("<", place, final), place, final)
                rows.append(b.add(query, b.mul(row, b.add(b.mul(head, queries), place))))
            with cgutils.for_range(b, size) as column:
                gathered = ir.Constant(_REALS, ir.Undefined)
                for lane, address in enumerate(rows):
                    number = load(b, address, b.mul(column.index, I64(4)), F32)
                    gathered = b.insert_element(gathered, number, I32(lane))
                store(b, b.fmul(gathered, scale), given, b.mul(column.index, I64(_LINE)))
            their = b.add(key, b.mul(own, row)), b.add(value, b.mul(own, out))
            _attend_tile(b, given, size, listed, bits, count, *their, scores, found, width)
            with cgutils.for_range(b, I64(LANES)) as lane:
                place = b.add(b.mul(b.add(at, lane.index), heads), head)
                target, source = b.add(y, b.mul(out, place)), b.mul(lane.index, I64(4))
                with _steps(b, width, _UNIT) as column:
                    for part in range(_UNIT):
                        line = b.mul(b.add(column, I64(part)), I64(_LINE))
                        number = load(b, found, b.add(line, source), F32)
                        store(b, number, target, b.mul(b.add(column, I64(part)), I64(4)))
        return context.get_dummy_value()

    return _TILES, generate


def _attend_tile(
    b: Builder, given: Any, size: Any, keys: Any, lanes: Any, count: Any, key: Any, value: Any,
    scores: Any, found: Any, width: Any,
) -> None:  # fmt: skip
    """Addresses of a tile's queries [size, LANES], its keys' numbers and lanes [count], a head's
    keys and values, scratch [count, LANES], and what comes out [width, LANES]."""
    lowest = fill(_REALS, -math.inf)
    largest, weights = _variable(b, lowest), _variable(b, fill(_REALS, 0))
    with _steps(b, count, AT_ONCE) as first:
        rows = [_row(b, keys, first, number, key, size) for number in range(AT_ONCE)]
        sums = [_variable(b, fill(_REALS, 0)) for _ in rows]
        with _steps(b, size, _UNIT) as column:
            for part in range(_UNIT):
                place = b.add(column, I64(part))
                queries = load(b, given, b.mul(place, I64(_LINE)), _REALS)
                for row, total in zip(rows, sums, strict=True):
                    _add_product(b, total, row, b.mul(place, I64(4)), queries)
        for number, total in enumerate(sums):
            place = b.add(first, I64(number))
            bits = b.trunc(load(b, lanes, b.mul(place, I64(4)), I32), I16)
            here = b.bitcast(bits, ir.VectorType(BIT, LANES))
            score = b.select(here, b.load(total), lowest)
            store(b, score, scores, b.mul(place, I64(_LINE)))
            # What is no number is not the largest: its exponential, and the sum, are none either.
            before = b.load(largest)
            b.store(b.select(b.fcmp_ordered(">", score, before), score, before), largest)
    most = b.load(largest)
    with _steps(b, count, 1) as place:
        at = b.mul(place, I64(_LINE))
        weight = _exponential(b, b.fsub(load(b, scores, at, _REALS), most))
        store(b, weight, scores, at)
        b.store(b.fadd(b.load(weights), weight), weights)
    whole = b.load(weights)
    dimensions = _UNIT if _long_registers() else _UNIT // 2
    with _steps(b, width, dimensions) as column:
        sums = [_variable(b, fill(_REALS, 0)) for _ in range(dimensions)]
        with _steps(b, count, 1) as place:
            row = _row(b, keys, place, 0, value, width)
            weight = load(b, scores, b.mul(place, I64(_LINE)), _REALS)
            for part, total in enumerate(sums):
                offset = b.mul(b.add(column, I64(part)), I64(4))
                _add_product(b, total, row, offset, weight)
        for part, total in enumerate(sums):
            offset = b.mul(b.add(column, I64(part)), I64(_LINE))
            store(b, b.fdiv(b.load(total), whole), found, offset)


def _long_registers() -> bool:
    """Whether one holds 16 numbers: 32 of them where it does, else 16 of half the length."""
    return "avx512_f" in features() and numba.config.CPU_NAME is None


def _variable(b: Builder, value: Any) -> Any:
    """A place that holds a value, set anew wherever this stands in a loop."""
    place = cgutils.alloca_once(b, value.type)
    b.store(value, place)
    return place


@contextmanager
def _steps(b: Builder, count: Any, size: int) -> Iterator[Any]:
    """A loop over 0, size, 2 size, … below a count that is a multiple of it."""
    with cgutils.for_range(b, b.udiv(count, I64(size))) as loop:
        yield b.mul(loop.index, I64(size))


def _row(b: Builder, keys: Any, first: Any, number: int, rows: Any, size: Any) -> Any:
    """Address of the row of a listed key."""
    at = b.mul(b.add(first, I64(number)), I64(4))
    key = b.sext(load(b, keys, at, I32), I64)
    return b.add(rows, b.mul(key, b.mul(size, I64(4))))


def _add_product(b: Builder, total: Any, row: Any, offset: Any, by: Any) -> None:
    """total += row[offset] · by"""
    number = splat(b, load(b, row, offset, F32), _REALS)
    b.store(call(b, f"fma.v{LANES}f32", _REALS, number, by, b.load(total)), total)


def _exponential(b: Builder, x: Any) -> Any:
    """Of x ≤ 0; 0 below `_LOWEST`; what is no number stays none."""

    def fma(*operands: Any) -> Any:
        return call(b, f"fma.v{LANES}f32", _REALS, *operands)

    shifted = fma(x, fill(_REALS, 1 / math.log(2)), fill(_REALS, _WHOLE))
    power = b.fsub(shifted, fill(_REALS, _WHOLE))
    rest = fma(power, fill(_REALS, -_LN2_HIGH), x)
    rest = fma(power, fill(_REALS, -_LN2_LOW), rest)
    sums = fill(_REALS, 1 / math.factorial(6))
    for degree in reversed(range(6)):
        sums = fma(sums, rest, fill(_REALS, 1 / math.factorial(degree)))
    exponent = b.add(b.bitcast(shifted, _INTEGERS), fill(_INTEGERS, 127))
    scaled = b.fmul(sums, b.bitcast(b.shl(exponent, fill(_INTEGERS, 23)), _REALS))
    vanishes = b.fcmp_ordered("<", x, fill(_REALS, _LOWEST))
    return b.select(vanishes, fill(_REALS, 0), scaled)
