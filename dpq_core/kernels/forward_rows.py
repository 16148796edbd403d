"""Many tokens through a linear on a CPU, in one pass: round, multiply, scale, round to BF16.

    y = bf16(channel_scale * scale * (x8 · weightᵀ) + bias)     x8 = round(x / scale), sums in FP32

A few hundred tokens at a time, which stay in the cache, are rounded (where they are to be), then
multiplied, in the way that `dpq_core.kernels.products` chooses for this processor, then scaled:

    by MKL       BF16 units of Intel's processors
    in panels    AVX512_BF16 where MKL does not use it (`dpq_core.kernels.bf16_panels`)
    as FP32      operands are widened piece by piece: `_PIECE` rows of the weight and `_DEPTH` of
                 its columns

In panels the order of the sums depends on neither the batch nor the threads, and what is below
FP32's normal numbers counts as zero. By the others it depends on neither (in a batch of two tokens
or more) where that was tried; MKL does not promise it.
"""

import functools
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from dpq_core.arithmetic.formats import NumberFormat
from dpq_core.kernels import bf16_panels, cpu, products
from dpq_core.kernels.bf16_panels import DEPTH, PANEL, TOKENS
from dpq_core.kernels.blas import AS_IS, ROW_MAJOR, TRANSPOSED, bf16_product, sgemm
from dpq_core.kernels.numba_loops import bits, real, round_rows

_PIECE, _DEPTH = 256, 1024  # a megabyte of FP32
_FEWEST, _MOST = 64, 512  # tokens of a share


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `forward` takes them."""
    library = bf16_product if products.by_mkl() else sgemm
    here = products.in_panels() or library is not None
    both_bf16 = x.dtype == weight.dtype == torch.bfloat16
    return here and x.is_cpu and both_bf16 and not x.requires_grad


def forward(
    x: Tensor,  # [..., in] bf16
    weight: Tensor,  # [out, in] bf16
    bias: Tensor | None,  # [out]
    channel_scale: Tensor | None = None,  # [out] fp32; None is 1
    scale: Tensor | None = None,  # fp32, scalar or [..., 1]; None: x is not rounded
    inner: NumberFormat | None = None,  # that x is rounded to
) -> Tensor:
    """[..., out] bf16. By MKL a single token is multiplied in another order than many."""
    (out, features), rows = weight.shape, x.reshape(-1, weight.shape[1])
    y = x.new_empty(len(rows), out)
    one = torch.ones(1, 1, dtype=torch.float32)
    scales = one if scale is None else scale.reshape(-1, 1)
    # All contiguous: for each other layout a process compiles for a second.
    channels = one.new_ones(out) if channel_scale is None else channel_scale.contiguous()
    added = one.new_empty(0) if bias is None else bias.detach().float().contiguous()
    _, *rounding = cpu.rounding_of(inner)
    kernel, shares = _way(len(rows), features, take_threads())
    if features % 2 and products.in_panels():
        rows = pad(rows, (0, 1))  # to whole pairs
    kernel(
        cpu.bits_of(rows),
        scales.expand(len(rows), 1).contiguous().numpy(),
        scale is not None,
        *rounding,
        cpu.bits_of(weight),
        channels.numpy(),
        added.numpy(),
        cpu.bits_of(y),
        *shares,
    )
    return y.view(*x.shape[:-1], out)


def take_threads() -> int:
    """As many of Numba's threads as torch has now, or can be had, for the kernel that is next."""
    threads = start_threads(torch.get_num_threads())
    numba.set_num_threads(threads)
    return threads


@functools.cache
def start_threads(threads: int) -> int:
    """Numba's threads, of the OpenMP runtime that torch uses; how many of `threads` it can take.

    Starting them changes the number that torch takes, which is put back.
    """
    numba.config.THREADING_LAYER = "omp"
    possible = min(threads, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(possible)
    torch.set_num_threads(threads)
    return int(possible)


def _way(rows: int, features: int, threads: int) -> tuple[Any, tuple[int, ...]]:
    """The kernel, and how it shares its work."""
    if products.in_panels():
        return _in_panels(), _tasks(rows, _MOST, threads)
    if products.by_mkl():
        return _by_mkl, _shares(rows, features, threads)
    limit = max(_FEWEST, min(_MOST, (1 << 20) // features))
    return _as_fp32, _tasks(rows, limit, threads)


def _shares(rows: int, features: int, threads: int) -> tuple[int]:
    """Shares of the rows: at least one a thread, small enough for the cache, 64 rows and more.

    Each share packs the weight anew: wide layers, whose weight fills the cache anyway, are better
    off with large shares.
    """
    limit = 256 if features <= 512 else 1024
    return (max(1, min(max(-(-rows // limit), threads), rows // _FEWEST)),)


def _tasks(rows: int, limit: int, threads: int) -> tuple[int, int]:
    """Shares of the tokens, `limit` each at most, and of the weight's rows: those of the weight
    where tokens are few."""
    shares = -(-rows // limit)
    if rows >= threads * _FEWEST:
        return -(-shares // threads) * threads, 1
    return shares, threads


@numba.njit(error_model="numpy")
def scale_rows(
    sums: NDArray[np.float32],  # [rows, n or more]
    channel_scale: NDArray[np.float32],  # [n]
    scale: NDArray[np.float32],  # [rows, 1]
    bias: NDArray[np.float32],  # [n], or empty
    y: NDArray[np.int16],  # [rows, out] bf16, written
    first: int,  # of y's columns
) -> None:
    """y = sums · channel_scale · scale + bias, rounded to BF16, of n columns.

    All arrays are contiguous: by strides, such as those of some columns, it takes eight times as
    long."""
    for row in range(len(sums)):
        found, target = sums[row], y[row, first : first + len(channel_scale)]
        for column in range(len(channel_scale)):
            value = found[column] * channel_scale[column] * scale[row, 0]
            if bias.size:
                value += bias[column]
            pattern = bits(value)
            even = np.int32(pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16
            target[column] = even if value == value else 0x7FC0


@numba.njit(error_model="numpy")
def _multiply(
    x: NDArray[np.int16],  # [rows, in] bf16
    weight: NDArray[np.int16],  # [out, in] bf16
    sums: NDArray[np.float32],  # [rows, out], written
) -> None:
    """sums = x · weightᵀ. As the arguments of a function the arrays outlive their addresses."""
    (rows, features), out = x.shape, len(weight)
    bf16_product(
        ROW_MAJOR, AS_IS, TRANSPOSED, rows, out, features,
        1.0, x.ctypes.data, features, weight.ctypes.data, features,
        0.0, sums.ctypes.data, out,
    )  # fmt: skip


@numba.njit(nogil=True, parallel=True, error_model="numpy")
def _by_mkl(
    x: NDArray[np.int16],  # [rows, in] bf16
    scale: NDArray[np.float32],  # [rows, 1]
    rounds: bool,  # whether x is rounded
    maximum: np.float32,
    mask: np.int32,
    lowest: np.int32,
    weight: NDArray[np.int16],  # [out, in] bf16
    channel_scale: NDArray[np.float32],  # [out]
    bias: NDArray[np.float32],  # [out], or empty
    y: NDArray[np.int16],  # [rows, out] bf16, written
    shares: int,
) -> None:
    """`forward` by MKL. NumPy holds BF16 as int16."""
    rows, out = len(x), len(weight)
    for number in numba.prange(shares):
        share = slice(number * rows // shares, (number + 1) * rows // shares)
        x8, scales = x[share], scale[share]
        if rounds:
            x8 = np.empty_like(x8)
            round_rows(0, len(x8), x[share], scales, x8, maximum, mask, lowest)
        sums = np.empty((len(x8), out), np.float32)
        _multiply(x8, weight, sums)
        scale_rows(sums, channel_scale, scales, bias, y[share], 0)


@functools.cache
def _in_panels() -> Any:
    """`forward` in panels: a kernel that takes what `_as_fp32` does, but x in whole pairs of
    columns: [rows, in + 1] where that is odd."""
    multiply = bf16_panels.multiplying()

    @numba.njit(nogil=True, parallel=True, error_model="numpy")
    def in_panels(
        x: NDArray[np.int16],
        scale: NDArray[np.float32],
        rounds: bool,
        maximum: np.float32,
        mask: np.int32,
        lowest: np.int32,
        weight: NDArray[np.int16],
        channel_scale: NDArray[np.float32],
        bias: NDArray[np.float32],
        y: NDArray[np.int16],
        shares: int,
        parts: int,
    ) -> None:
        rows, (out, features) = len(x), weight.shape
        for task in numba.prange(shares * parts):
            number, part = task // parts, task % parts
            share = slice(number * rows // shares, (number + 1) * rows // shares)
            x8, scales = x[share], scale[share]
            if rounds:
                x8 = np.empty_like(x8)
                round_rows(0, len(x8), x[share], scales, x8, maximum, mask, lowest)
            sums = np.empty((-(-len(x8) // TOKENS) * TOKENS, PANEL), np.float32)
            panel = np.empty((min(features, DEPTH) // 32 * 16 + 16, PANEL, 2), np.int16)
            last = (part + 1) * out // parts
            for first in range(part * out // parts, last, PANEL):
                some = slice(first, min(first + PANEL, last))
                multiply(x8, weight, some, panel, sums)
                added = bias[some] if bias.size else bias
                scale_rows(sums[: len(x8)], channel_scale[some], scales, added, y[share], first)

    return in_panels


@numba.njit(nogil=True, parallel=True, error_model="numpy")
def _as_fp32(
    x: NDArray[np.int16],
    scale: NDArray[np.float32],
    rounds: bool,
    maximum: np.float32,
    mask: np.int32,
    lowest: np.int32,
    weight: NDArray[np.int16],
    channel_scale: NDArray[np.float32],
    bias: NDArray[np.float32],
    y: NDArray[np.int16],
    shares: int,
    parts: int,  # of the weight's rows
) -> None:
    """`forward` as FP32: arguments of `_by_mkl`, and one more."""
    rows, out = len(x), len(weight)
    for task in numba.prange(shares * parts):
        number, part = task // parts, task % parts
        _some_as_fp32(
            number * rows // shares, (number + 1) * rows // shares,
            part * out // parts, (part + 1) * out // parts,
            x, scale, rounds, maximum, mask, lowest, weight, channel_scale, bias, y,
        )  # fmt: skip


@numba.njit(nogil=True, error_model="numpy")
def _some_as_fp32(
    token: int,
    last_token: int,
    row: int,
    last_row: int,
    x: NDArray[np.int16],
    scale: NDArray[np.float32],
    rounds: bool,
    maximum: np.float32,
    mask: np.int32,
    lowest: np.int32,
    weight: NDArray[np.int16],
    channel_scale: NDArray[np.float32],
    bias: NDArray[np.float32],
    y: NDArray[np.int16],
) -> None:
    """`_as_fp32` of some tokens and some rows of the weight."""
    share, features = slice(token, last_token), x.shape[1]
    x8, scales, target = x[share], scale[share], y[share]
    if rounds:
        x8 = np.empty_like(x8)
        round_rows(0, len(x8), x[share], scales, x8, maximum, mask, lowest)
    wide = np.empty(x8.shape, np.float32)
    widen(x8, wide)
    pieces = -(-features // _DEPTH)
    piece = np.empty((_PIECE, -(-features // pieces)), np.float32)
    sums, sizes = np.empty(len(x8) * _PIECE, np.float32), np.empty(5, np.int32)
    for first in range(row, last_row, _PIECE):
        some = slice(first, min(first + _PIECE, last_row))
        found = sums[: len(x8) * (some.stop - first)].reshape(len(x8), some.stop - first)
        for start in range(0, features, piece.shape[1]):
            depth = slice(start, min(start + piece.shape[1], features))
            widen(weight[some, depth], piece)
            add_product(wide, depth, piece, found, sizes)
        added = bias[some] if bias.size else bias
        scale_rows(found, channel_scale[some], scales, added, target, first)


@numba.njit(error_model="numpy")
def widen(values: NDArray[np.int16], wide: NDArray[np.float32]) -> None:
    """BF16 to FP32, [n, m]."""
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            wide[row, column] = real(np.int32(values[row, column]) << 16)


@numba.njit(error_model="numpy")
def add_product(
    x: NDArray[np.float32],  # [rows, in]
    depth: slice,  # of the columns of x
    piece: NDArray[np.float32],  # [n or more, _DEPTH or in], the weight's columns there
    sums: NDArray[np.float32],  # [rows, n], written at the first columns, added to at others
    sizes: NDArray[np.int32],  # [5], scratch
) -> None:
    """sums += x · pieceᵀ."""
    sizes[0], sizes[1], sizes[2] = sums.shape[1], len(x), depth.stop - depth.start
    sizes[3], sizes[4] = piece.shape[1], x.shape[1]
    at, beta = sizes.ctypes.data, _ZERO_ONE.ctypes.data + 4 * (depth.start > 0)
    form, one = _FORM.ctypes.data, _ZERO_ONE.ctypes.data + 4
    sgemm(
        form, form + 1, at, at + 4, at + 8,
        one, piece.ctypes.data, at + 12, x.ctypes.data + 4 * depth.start, at + 16,
        beta, sums.ctypes.data, at,
    )  # fmt: skip


_FORM = np.frombuffer(b"TN", np.uint8)  # of the weight, which is transposed, and of the tokens
_ZERO_ONE = np.array([0, 1], np.float32)
