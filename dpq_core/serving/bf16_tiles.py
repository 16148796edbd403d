"""Micro-kernel for many tokens on processors with AVX512_BF16: one instruction (vdpbf16ps) adds the
products of 16 pairs of BF16 numbers to 16 sums, twice as many as an FP32 one of 512 bits.

Weights of 8 bits and inputs as they are rounded are BF16 numbers, whose products FP32 holds, so the
arithmetic is that of `avx2_kernels.tiling`, in another order. Numbers below FP32's normal ones
count as zero.

Source: Intel's Intrinsics Guide (AVX512_BF16).
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dpq_core.serving.avx2_kernels import ROWS, added_up, compiled
from dpq_core.serving.llvm import BF16, F32, I64, call, fill, load, pick, store
from dpq_core.serving.weights import UNIT

TOKENS = 6  # of a tile: 24 sums, 6 inputs and a weight are 31 of the 32 registers
_NUMBERS = 32  # of a register
_SUMS, _PAIRS = ir.VectorType(F32, _NUMBERS // 2), ir.VectorType(BF16, _NUMBERS)


def tiling() -> Any:
    """Kernel that adds products of `ROWS` decoded rows and some tokens to their sums, `TOKENS` at a
    time. Arguments: those of `avx2_kernels.tiling`; rows and inputs are BF16."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        tiles, rows, row_stride, units, x, x_stride, sums, sums_stride = arguments
        count = b.mul(units, I64(UNIT // _NUMBERS))
        with cgutils.for_range(b, tiles) as loop:
            first = b.mul(loop.index, I64(TOKENS))
            numbers = [b.add(first, I64(token)) for token in range(TOKENS)]
            tokens = [b.add(x, b.mul(x_stride, number)) for number in numbers]
            totals = [[_zero(b) for _ in range(ROWS)] for _ in tokens]
            with cgutils.for_range(b, count) as step:
                at = b.mul(step.index, I64(2 * _NUMBERS))
                inputs = [load(b, token, at, _PAIRS) for token in tokens]
                for row in range(ROWS):
                    weight = load(b, b.add(rows, b.mul(row_stride, I64(row))), at, _PAIRS)
                    for given, total in zip(inputs, totals, strict=True):
                        name, sum_ = "x86.avx512bf16.dpbf16ps.512", b.load(total[row])
                        b.store(call(b, name, _SUMS, sum_, weight, given), total[row])
            for number, total in zip(numbers, totals, strict=True):
                lanes = added_up(b, [_halved(b, b.load(each)) for each in total])
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


def _zero(b: Any) -> Any:
    variable = cgutils.alloca_once(b, _SUMS)
    b.store(fill(_SUMS, 0), variable)
    return variable


def _halved(b: Any, sums: Any) -> Any:
    half = _SUMS.count // 2
    low, high = (pick(b, sums, sums, range(first, first + half)) for first in (0, half))
    return b.fadd(low, high)
