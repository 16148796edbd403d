"""How the Hopper runtime keeps a layer of 4-bit codes, and how many programs share its columns.

Rows are padded to 128 and columns to 256 with codes that stand for zero; a *block* is 128 × 256. A
byte a two codes, and for each group a 16-bit scale and a 4-bit zero point: 0.52 bytes a weight with
groups of 128.

    words   [row tiles, blocks, 4096] int32      blocks along the columns; order in `pack_words`
    scales  [blocks, groups in 128 columns, rows] int32   of a block's two halves of 128 columns,
            the first in the low 16 bits: FP16 for E4M3 arithmetic, BF16 for 16 bits
    zeros   [blocks · groups / 4, rows] int32    eight groups' zero points, lowest bits first

Other group sizes are stored as several groups of their largest common divisor with 128.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpq_core.arithmetic.formats import FORMATS, round_to
from dpq_core.layer.grid import SYMMETRIC_ZERO_POINT, Grid
from dpq_core.layer.records import QuantizedWeight

ROWS, COLUMNS, HALF = 128, 256, 128
SMALLEST_GROUP = 32


@dataclass(frozen=True)
class Packed:
    """A weight of 4-bit codes as the kernels read it; see the module."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None  # None: 8 everywhere
    groups: int  # in 128 columns
    limit: int  # what decoded values are clamped to; 448 where no code reaches further


def pack(weight: QuantizedWeight) -> Packed:
    """Lay out a weight whose group size is a multiple of 32, of E4M3 or 16-bit arithmetic.

    Raises:
        ValueError: a group scale is not finite.
    """
    grid = weight.grid
    symmetric = bool((grid.zero_point == SYMMETRIC_ZERO_POINT).all())
    rows, features = weight.codes.shape
    size = math.gcd(grid.group_size, HALF)
    missing_rows, missing = -rows % ROWS, -features % COLUMNS
    group = torch.arange(0, features, size, device=weight.codes.device) // grid.group_size
    more = (features + missing) // size - len(group)
    scale = pad(grid.group_scale[:, group], (0, more, 0, missing_rows), value=1.0)
    padded_zero = SYMMETRIC_ZERO_POINT if symmetric else 0
    zero = pad(grid.zero_point[:, group], (0, more, 0, missing_rows), value=padded_zero)
    codes = zero.repeat_interleave(size, 1)
    codes[:rows, :features] = weight.codes
    stored = scale.to(torch.bfloat16) if grid.inner is None else fp16_scales(scale)
    return Packed(
        words=pack_words(codes, run=2 if grid.inner is None else 4),
        scales=_pack_scales(stored, HALF // size),
        zeros=None if symmetric else _pack_zeros(zero),
        groups=HALF // size,
        limit=_limit(grid),
    )


def pack_words(codes: Tensor, run: int) -> Tensor:
    """[rows, columns] uint8, in whole blocks → [row tiles, blocks, 4096] int32.

    An int32 has two codes next to each other in the same four bits of its 16-bit halves. Its four
    pairs stand in `run` columns that follow on each other: two pairs in a row, from two halves of a
    block (run 4: a register of E4M3), or one in each of four quarters (run 2: a register of BF16).

    Word j = 4 t + q of row 16 w + 8 h + r is held by thread 4 r + q of warp w, as `wgmma` lays out
    its left operand: eight threads' rows r, four threads to a row. Stored are, for h and for each
    half of the t, the 256 threads' four words.
    """
    rows = max(1, _CODES_AT_ONCE // (ROWS * codes.shape[1])) * ROWS
    return torch.cat([_pack_tiles(part, run) for part in codes.split(rows)])


_CODES_AT_ONCE = 1 << 24  # bounds the memory that packing takes, 20 bytes a code


def _pack_tiles(codes: Tensor, run: int) -> Tensor:
    """`pack_words` of some row tiles."""
    tiles, blocks, parts = codes.shape[0] // ROWS, codes.shape[1] // COLUMNS, 8 // run
    split = codes.int().view(tiles, ROWS, blocks, parts, 32, run // 2, 2)
    pairs = split.permute(0, 1, 2, 4, 3, 5, 6).reshape(tiles, ROWS, blocks, 32, 4, 2)
    shifts = torch.tensor([[4 * m, 4 * m + 16] for m in range(4)], device=codes.device)
    words = _int32((pairs.long() << shifts).sum((-2, -1)))  # [tiles, rows, blocks, word]
    threads = words.view(tiles, 8, 2, 8, blocks, 2, 4, 4)  # tile, w, h, r, block, t, t, q
    return threads.permute(0, 4, 2, 5, 1, 3, 7, 6).reshape(tiles, blocks, -1).contiguous()


def fp16_scales(scale: Tensor) -> Tensor:
    """Group scales [...] bf16 → fp16 with e4m3(fp16(scale · d)) = e4m3(s4 · d) for d of ±1 … ±15.

    The nearest FP16 number, or where the double rounding shows, one of its neighbours. Every
    positive BF16 number has such a scale (tested).

    Raises:
        ValueError: a scale is not finite.
    """
    values, where = scale.float().unique(return_inverse=True)
    steps = torch.arange(1, 16, device=scale.device).float()
    wanted = round_to(values[:, None] * steps, FORMATS["e4m3"])
    nearest = values.clamp(-_SATURATED, _SATURATED).to(torch.float16)
    chosen, found = nearest.clone(), torch.zeros_like(values, dtype=torch.bool)
    for move in (0, -1, 1):
        candidate = (nearest.view(torch.int16) + move).view(torch.float16)
        products = (candidate.float()[:, None] * steps).to(torch.float16)
        fits = (round_to(products, FORMATS["e4m3"]) == wanted).all(1) & ~found
        chosen, found = torch.where(fits, candidate, chosen), found | fits
    if not found.all():
        raise ValueError(f"group scale {values[~found][0].item():g} has no FP16 equivalent")
    scales: Tensor = chosen[where]
    return scales


_SATURATED = 4096.0  # every code but the zero point decodes to 448, and 15 · 4096 is in FP16


def _limit(grid: Grid) -> int:
    """240 where the format ends there and a code lies beyond; else the conversion's own 448."""
    ends_early = grid.inner is not None and grid.inner.maximum == 240
    return 240 if ends_early and grid.saturates() else 448


def _pack_scales(scale: Tensor, groups: int) -> Tensor:
    """[rows, groups of all halves] 16-bit → [blocks, groups, rows] int32."""
    bits = scale.view(torch.int16).long() & 0xFFFF
    halves = bits.view(len(scale), -1, 2, groups)
    return _int32(halves[:, :, 0] | halves[:, :, 1] << 16).permute(1, 2, 0).contiguous()


def _pack_zeros(zero: Tensor) -> Tensor:
    """[rows, groups of all halves] uint8 → [groups / 8, rows] int32."""
    eights = pad(zero, (0, -zero.shape[1] % 8)).long().unflatten(1, (-1, 8))
    shifts = torch.arange(0, 32, 4, device=zero.device)
    return _int32((eights << shifts).sum(2)).T.contiguous()


def _int32(words: Tensor) -> Tensor:
    """int64 of 32 bits → int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def choose_split(tiles: int, steps: int, tokens: int, processors: int) -> int:
    """How many programs share the `steps` blocks of each of `tiles` row tiles.

    The least time of the busiest processor, counted in blocks: its programs one after the other,
    each a block more for its beginning and end. Sums that are shared are written and read in FP32
    through the L2 cache, which takes as long as a block for 32 tokens. One program alone takes as
    long as two, which hide each other's waiting.
    """

    def blocks(split: int) -> float:
        shared = tokens / 32 if split > 1 else 0.0
        one = math.ceil(steps / split) + 1 + shared
        return max(2, math.ceil(tiles * split / processors)) * one

    best = min(range(1, min(steps, _MOST_SHARES) + 1), key=blocks)
    return math.ceil(steps / math.ceil(steps / best))  # no program without blocks


_MOST_SHARES = 16
