"""Products of BF16 operands by AVX512_BF16, where MKL's own product does not use it.

    sums += x · weightᵀ      of 64 rows of the weight, with FP32 sums

One instruction (vdpbf16ps) multiplies 16 pairs of BF16 numbers and adds each pair's products to one
of 16 sums. MKL multiplies by it on Intel's processors only; oneDNN does everywhere, but returns
BF16.

    panel  [in / 2, 64, 2] bf16   pairs of columns of 64 rows, the rows side by side
    tile   6 tokens x 64 rows     24 registers of sums, 4 of a panel, and one that a token's pair
                                  fills: 29 of 32

A panel is written by transposing 16 rows x 16 pairs in registers, which costs what the products of
six tokens do, and stays in the second cache while tokens pass it. A sum is added up two columns at
a time from the first on, whatever is multiplied beside it: in one order for any number of tokens,
rows and threads. Numbers below FP32's normal ones count as zero, as operands and as sums.

Source: Intel's Intrinsics Guide (AVX512_BF16).
"""

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from dpq_core.kernels.llvm import (
    BF16,
    F32,
    I16,
    I32,
    I64,
    Builder,
    at,
    call,
    compiled,
    fill,
    load,
    pick,
    splat,
    store,
)

PANEL = 64  # rows of the weight
TOKENS = 6  # of a tile
DEPTH = 2048  # columns of a panel: a quarter of a megabyte
_LANES, _LINE = 16, 64  # sums, and bytes, of a register
_PARTS = PANEL // _LANES
_SUMS, _PAIRS = ir.VectorType(F32, _LANES), ir.VectorType(BF16, 2 * _LANES)
_INTEGERS, _WORDS = ir.VectorType(I32, _LANES), ir.VectorType(I16, 2 * _LANES)
_COLUMNS = ir.VectorType(I64, 2 * _LANES)
_PACK, _ADD = types.void(*[types.int64] * 5), types.void(*[types.int64] * 7)


@functools.cache
def multiplying() -> Any:
    """A function for other kernels, which calls compiled code: who calls it does not compile that
    again."""
    pack = compiled(_PACK, lambda a, b, c, d, e: _pack(a, b, c, d, e))
    add = compiled(_ADD, lambda a, b, c, d, e, f, g: _add_products(a, b, c, d, e, f, g))

    @numba.njit(error_model="numpy")
    def multiply(
        x: NDArray[np.int16],  # [tokens, in, and one more where that is odd] bf16, contiguous
        weight: NDArray[np.int16],  # [out, in] bf16, contiguous
        rows: slice,  # of the weight: up to `PANEL`
        panel: NDArray[np.int16],  # [in / 2 (of `DEPTH` at most) in whole 16s, PANEL, 2], scratch
        sums: NDArray[np.float32],  # [tokens in whole tiles, PANEL], written
    ) -> None:
        """sums = x · weightᵀ, of some rows of the weight."""
        (tokens, stride), features = x.shape, weight.shape[1]
        sums[:] = 0
        for first in range(0, features, DEPTH):
            columns = min(DEPTH, features - first)
            pack(
                weight.ctypes.data + 2 * (rows.start * features + first), 2 * features,
                rows.stop - rows.start - 1, columns, panel.ctypes.data,
            )  # fmt: skip
            add(
                len(sums) // TOKENS, x.ctypes.data + 2 * first, 2 * stride, tokens - 1,
                (columns + 1) // 2, panel.ctypes.data, sums.ctypes.data,
            )  # fmt: skip

    return multiply


@intrinsic
def _pack(_: Any, weight: Any, stride: Any, last: Any, columns: Any, panel: Any) -> Any:
    """Write a panel of some columns, zero beyond them.

    Addresses of the weight, at the panel's first row and column, and of the panel; bytes from a row
    to the next, the last row's number (it stands in for those beyond), how many columns.
    """

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        weight, stride, last, columns, panel = arguments
        numbers = ir.Constant(_COLUMNS, list(range(_COLUMNS.count)))
        pieces = b.udiv(b.add(columns, I64(_COLUMNS.count - 1)), I64(_COLUMNS.count))
        with cgutils.for_range(b, pieces) as piece, cgutils.for_range(b, I64(_PARTS)) as part:
            left = b.sub(columns, b.mul(piece.index, I64(_COLUMNS.count)))
            there = b.icmp_signed("<", numbers, splat(b, left, _COLUMNS))
            rows = []
            for lane in range(_LANES):
                number = b.add(b.mul(part.index, I64(_LANES)), I64(lane))
                row = b.add(weight, b.mul(stride, _least(b, number, last)))
                words = at(b, row, b.mul(piece.index, I64(_LINE)), _WORDS)
                given = call(
                    b, "masked.load.v32i16.p0", _WORDS, words, I32(2), there, fill(_WORDS, 0)
                )
                rows.append(b.bitcast(given, _INTEGERS))
            place = b.add(b.mul(piece.index, I64(_LANES * _PARTS)), part.index)
            for pair, lanes in enumerate(_transposed(b, rows)):
                store(b, lanes, panel, b.mul(b.add(place, I64(pair * _PARTS)), I64(_LINE)))
        return context.get_dummy_value()

    return _PACK, generate


def _transposed(b: Builder, rows: list[Any]) -> list[Any]:
    """16 registers of 16 pairs: blocks of 1, 2, 4 and 8 change places across the diagonal."""
    for size in (1, 2, 4, 8):
        kept = [lane & size == 0 for lane in range(_LANES)]
        upper = [lane if keeps else lane - size + _LANES for lane, keeps in enumerate(kept)]
        lower = [lane + size if keeps else lane + _LANES for lane, keeps in enumerate(kept)]
        for first in range(_LANES):
            if kept[first]:
                pair = rows[first], rows[first + size]
                rows[first], rows[first + size] = pick(b, *pair, upper), pick(b, *pair, lower)
    return rows


@intrinsic
def _add_products(
    _: Any, tiles: Any, x: Any, stride: Any, last: Any, pairs: Any, panel: Any, sums: Any
) -> Any:
    """Add products of a panel and some tokens to their sums, a tile at a time.

    How many tiles; address of x at the panel's first column, bytes from a token to the next, the
    last token's number (it stands in for those beyond), pairs of columns; addresses of the panel
    and of the sums.
    """

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        tiles, x, stride, last, pairs, panel, sums = arguments
        with cgutils.for_range(b, tiles) as loop:
            first = b.mul(loop.index, I64(TOKENS))
            numbers = [b.add(first, I64(token)) for token in range(TOKENS)]
            tokens = [b.add(x, b.mul(stride, _least(b, number, last))) for number in numbers]
            places = [
                [b.add(sums, b.mul(b.add(b.mul(number, I64(_PARTS)), I64(part)), I64(_LINE)))
                 for part in range(_PARTS)]
                for number in numbers
            ]  # fmt: skip
            totals = [
                [cgutils.alloca_once_value(b, load(b, place, 0, _SUMS)) for place in of_token]
                for of_token in places
            ]
            with cgutils.for_range(b, pairs) as pair:
                lines = b.add(panel, b.mul(pair.index, I64(_LINE * _PARTS)))
                weights = [load(b, lines, _LINE * part, _PAIRS) for part in range(_PARTS)]
                for token, of_token in zip(tokens, totals, strict=True):
                    given = load(b, token, b.mul(pair.index, I64(4)), I32)
                    inputs = b.bitcast(splat(b, given, _INTEGERS), _PAIRS)
                    for weight, total in zip(weights, of_token, strict=True):
                        added = b.load(total), weight, inputs
                        b.store(call(b, "x86.avx512bf16.dpbf16ps.512", _SUMS, *added), total)
            for of_token, total in zip(places, totals, strict=True):
                for place, each in zip(of_token, total, strict=True):
                    store(b, b.load(each), place, 0)
        return context.get_dummy_value()

    return _ADD, generate


def _least(b: Builder, number: Any, last: Any) -> Any:
    return b.select(b.icmp_signed("<", number, last), number, last)
