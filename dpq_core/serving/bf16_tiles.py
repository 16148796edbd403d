"""Tiles for processors with AVX512_BF16: one instruction (vdpbf16ps) adds the products of 16 pairs
of BF16 numbers to 16 sums, twice as many as an FP32 one of 512 bits.

Weights of 8 bits and inputs as they are rounded are BF16 numbers, whose products FP32 holds, so the
arithmetic is that of tiles in FP32, in another order. Numbers below FP32's normal ones count as
zero.

Source: Intel's Intrinsics Guide (AVX512_BF16).
"""

from typing import Any

import numpy as np
from llvmlite import ir

from dpq_core.kernels.llvm import BF16, F32, I16, Builder, call, fill, pick
from dpq_core.serving.avx2_kernels import INTEGERS, LANES, Tile

_SUMS, _PAIRS = ir.VectorType(F32, 16), ir.VectorType(BF16, 32)


def _upper_halves(b: Builder, reals: Any) -> Any:
    """FP32 that BF16 holds, as that."""
    shifted = b.lshr(b.bitcast(reals, INTEGERS), fill(INTEGERS, 16))
    return b.trunc(shifted, ir.VectorType(I16, LANES))


def _add_products(b: Builder, weights: Any, inputs: Any, sums: Any) -> Any:
    return call(b, "x86.avx512bf16.dpbf16ps.512", _SUMS, sums, weights, inputs)


def _halves_added(b: Builder, sums: Any) -> Any:
    low, high = (pick(b, sums, sums, range(first, first + LANES)) for first in (0, LANES))
    return b.fadd(low, high)


# 24 sums, 6 inputs and a weight are 31 of the 32 registers. NumPy holds BF16 as int16.
BF16_TILE = Tile(6, np.int16, _PAIRS, _SUMS, _upper_halves, _add_products, _halves_added)
