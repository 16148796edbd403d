"""Triton kernels of the Hopper runtime: `hopper` launches them, `hopper_packing` lays out what they
read, `dpq_core.layer.linear` defines what they compute.

A *block* is 128 rows × 256 columns of codes: 16 KiB, in the order in which the threads of 8 warps
hold the left operand of `wgmma`. A thread copies 16 bytes at a time into shared memory (`cp.async`,
several blocks ahead), takes the same 16 bytes out again, and decodes them where they are
multiplied: the weight is never moved between threads, and there are no bank conflicts.

Decoding two codes of a word takes four instructions, two codes each:

    LOP3    (word & 0x000F000F) | 0x64006400       1024 + k, as FP16
    HADD2   − (1024 + z)                           k − z, exactly
    HMUL2   · s                                    s · (k − z), rounded to FP16
    F2FP    cvt.rn.satfinite.e4m3x2.f16x2          Ŵ8

FP16 has 11 bits and s4 · (k − z) up to 12: rounded twice, 31 of BF16's scales would give some code
another Ŵ8 than DPQ's. `hopper_packing.fp16_scales` moves those by one unit in the last place, which
makes all of them exact. Codes at bits 4 to 7 take the magic number 64 in place of 1024; the upper
eight bits of each half are shifted down by 8. For 16-bit arithmetic the same is done in BF16
(128 + k), where the product's rounding is the definition's.

What bounds it on an H200 (4.3 TB/s, 132 processors, 1.98 GHz): 16.5 bytes a clock and processor,
that is 32 codes with their scales. A thread's 128 codes of a block cost 446 instructions (of the
compiled loop, 16 tokens; 256 of them are the four above), 3.5 a code: at the bandwidth's limit 111
of the 128 that a processor issues a clock, at 75 % of it 83. Loads in flight: three blocks a
program and two or three programs a processor, 100 KiB, four times what the latency asks for. FP8
sums of the tensor cores keep about 14 bits: after 128 columns they are taken out, added in FP32.

Few tokens leave most of the processors without rows, so programs share the columns of the same rows
(split K). Each writes its sums; the last one to arrive adds them in order, so that the result does
not depend on who was last, scales them and writes BF16. `multiply` is launched while `quantize`
still runs (programmatic dependent launch) and waits for it before its first copy.

Instructions are counted from the compiled kernels; times are in docs/log.md. There too what an H100
showed to be slower: fetching the first codes into the L2 cache before that wait, and launching
every kernel, not only `multiply`, before the one ahead of it has ended.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(128)
COLUMNS = tl.constexpr(256)
WORDS = tl.constexpr(32)  # int32 of a block's row
WARPS = 8

# Triton's interpreter has no PTX. There codes are decoded in FP32, which gives the same bits.
INTERPRETED = bool(triton.knobs.runtime.interpret)
PTX = tl.constexpr(not INTERPRETED)

# $2: word, $3: zero point and magic number, $4: scale, both twice. LUT 0xEA: (a & b) | c.
_PAIR = tl.constexpr(
    "{ .reg .b32 t; lop3.b32 t, $2, 0x000F000F, 0x64006400, 0xEA;"
    " sub.rn.f16x2 t, t, $3; mul.rn.f16x2 t, t, $4; mov.b32 {$0, $1}, t; }"
)
_PAIR_ABOVE = tl.constexpr(
    "{ .reg .b32 t; lop3.b32 t, $2, 0x00F000F0, 0x54005400, 0xEA;"
    " sub.rn.f16x2 t, t, $3; mul.rn.f16x2 t, t, $4; mov.b32 {$0, $1}, t; }"
)
_PAIR_BF16 = tl.constexpr(
    "{ .reg .b32 t; lop3.b32 t, $2, 0x000F000F, 0x43004300, 0xEA;"
    " sub.rn.bf16x2 t, t, $3; mul.rn.bf16x2 t, t, $4; mov.b32 {$0, $1}, t; }"
)


@triton.jit
def _half_of(pair: tl.tensor, upper: tl.constexpr, kind: tl.constexpr) -> tl.tensor:
    """One of the two 16-bit numbers in an int32, as FP32."""
    bits = (pair >> 16) if upper else pair
    return bits.to(tl.int16).to(kind, bitcast=True).to(tl.float32)


@triton.jit
def _stated(codes: tl.tensor, zero: tl.tensor, scale: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """What the PTX computes, in FP32, where it is exact, and rounded once. codes: with the magic
    number."""
    s, z = _half_of(scale, False, kind), _half_of(zero, False, kind)
    lower = (_half_of(codes, False, kind) - z) * s
    upper = (_half_of(codes, True, kind) - z) * s
    return lower.to(kind), upper.to(kind)


@triton.jit
def _fp16_pair(
    word: tl.tensor, zero: tl.tensor, scale: tl.tensor, above: tl.constexpr
) -> tl.tensor:
    """The codes in the lowest four bits of a word's halves, or in those above: s · (k − z)."""
    if PTX:
        assembly: tl.constexpr = _PAIR_ABOVE if above else _PAIR
        lower, upper = tl.inline_asm_elementwise(
            assembly, "=h,=h,r,r,r", [word, zero, scale], (tl.float16, tl.float16), True, 1
        )
    elif above:
        lower, upper = _stated((word & 0x00F000F0) | 0x54005400, zero, scale, tl.float16)
    else:
        lower, upper = _stated((word & 0x000F000F) | 0x64006400, zero, scale, tl.float16)
    return lower, upper


@triton.jit
def _bf16_pair(word: tl.tensor, zero: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """The same in BF16, of the lowest four bits."""
    if PTX:
        lower, upper = tl.inline_asm_elementwise(
            _PAIR_BF16, "=h,=h,r,r,r", [word, zero, scale], (tl.bfloat16, tl.bfloat16), True, 1
        )
    else:
        lower, upper = _stated((word & 0x000F000F) | 0x43004300, zero, scale, tl.bfloat16)
    return lower, upper


@triton.jit
def _spread(values: tl.tensor, groups: tl.constexpr) -> tl.tensor:
    """[ROWS, groups] → [ROWS, WORDS]: to the words of each group."""
    wide = tl.broadcast_to(values[:, :, None], (ROWS, groups, WORDS // groups))
    return tl.reshape(wide, (ROWS, WORDS))


@triton.jit
def _load_words(words: tl.tensor, tile: tl.tensor, step: tl.tensor, steps: tl.tensor) -> tl.tensor:
    """A block's codes, int32 [ROWS, WORDS]; see `hopper_packing.pack_words` for the order."""
    size: tl.constexpr = ROWS * WORDS
    raw = tl.load(words + (tile * steps + step).to(tl.int64) * size + tl.arange(0, size))
    split = tl.permute(tl.reshape(raw, (2, 2, 8, 8, 4, 4)), (2, 0, 3, 1, 5, 4))
    return tl.reshape(split, (ROWS, WORDS))


@triton.jit
def _load_grid(
    scales: tl.tensor, zeros: tl.tensor, tile: tl.tensor, step: tl.tensor, rows: tl.tensor,
    part: tl.constexpr, count: tl.constexpr, groups: tl.constexpr, zero_points: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What a part of a block needs: scales of both halves, and zero points, shifted so that the
    first half's is lowest. int32 [ROWS, count], of the `count` groups of the part."""
    first: tl.constexpr = (part % (groups // count)) * count
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    group = first + tl.arange(0, count)[None, :]
    scale = tl.load(scales + (step * groups + group) * rows + row)
    if zero_points:
        each: tl.constexpr = 4 // groups  # blocks whose zero points an int32 holds
        zero = tl.load(zeros + (step // each) * rows + row)
        zero = zero >> ((step % each) * (8 * groups) + 4 * group)
    else:
        zero = scale
    return scale, zero


@triton.jit
def _decode(
    words: tl.tensor, scale: tl.tensor, zero: tl.tensor, part: tl.constexpr,
    groups: tl.constexpr, count: tl.constexpr, zero_points: tl.constexpr, fp8: tl.constexpr,
    limit: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Part of a block: [ROWS, 128] E4M3 (two parts), or [ROWS, 64] BF16 (four)."""
    half: tl.constexpr = part if fp8 else part // 2
    s = ((scale >> 16) if half else scale) & 0xFFFF
    s = _spread(s * 0x10001, count)
    if zero_points:
        z = ((zero >> (4 * groups * half)) & 15) * 0x10001
    else:
        z = (scale & 0) + 0x80008
    if fp8:
        shifted = words >> 8 if part else words
        v0, v1 = _fp16_pair(shifted, _spread(z | 0x64006400, count), s, False)
        v2, v3 = _fp16_pair(shifted, _spread((z << 4) | 0x54005400, count), s, True)
        values = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (ROWS, 128))
        if limit < 448:
            values = tl.clamp(values, -1.0 * limit, 1.0 * limit)
        decoded = values.to(tl.float8e4nv)
    else:
        v0, v1 = _bf16_pair(words >> (4 * part), _spread(z | 0x43004300, count), s)
        decoded = tl.reshape(tl.join(v0, v1), (ROWS, 64))
    return decoded


@triton.jit
def _write(
    y: tl.tensor, sums: tl.tensor, channel_scale: tl.tensor, token_scale: tl.tensor,
    bias: tl.tensor, tile: tl.tensor, tokens: tl.tensor, out: tl.tensor,
    TOKENS: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """y = sums · channel_scale · token_scale + bias, in BF16. sums [ROWS, TOKENS]."""
    row = tile * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    if SCALED:
        sums = sums * tl.load(channel_scale + row, mask=row < out, other=0.0)[:, None]
        sums = sums * tl.load(token_scale + token, mask=token < tokens, other=0.0)[None, :]
    if BIAS:
        sums += tl.load(bias + row, mask=row < out, other=0.0).to(tl.float32)[:, None]
    inside = (row < out)[:, None] & (token < tokens)[None, :]
    tl.store(y + token[None, :] * out + row[:, None], sums.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["tokens", "steps", "share_steps"])  # one compilation for all
def multiply(
    y: tl.tensor,  # [tokens, out] bf16, written
    x: tl.tensor,  # [tokens, stride] e4m3, or bf16 for 16-bit arithmetic
    words: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    channel_scale: tl.tensor,  # [out] fp32
    token_scale: tl.tensor,  # [tokens] fp32
    bias: tl.tensor,  # [out] bf16
    partial: tl.tensor,  # [SPLIT, row tiles, TOKENS, ROWS] fp32, written
    arrived: tl.tensor,  # [row tiles] int32, zero before and after
    tokens: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,  # out, padded
    features: tl.tensor,  # columns of x that are there
    stride: tl.tensor,  # of x
    steps: tl.tensor,  # blocks along the columns
    share_steps: tl.tensor,  # of a program
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,  # in 128 columns
    ZEROS: tl.constexpr,  # whether there are zero points
    FP8: tl.constexpr,
    LIMIT: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether x has all columns of the blocks
    SPLIT: tl.constexpr,
) -> None:
    """Few tokens. Grid: (row tiles, SPLIT)."""
    tile, share = tl.program_id(0), tl.program_id(1)
    parts: tl.constexpr = 2 if FP8 else 4
    width: tl.constexpr = COLUMNS // parts
    count: tl.constexpr = GROUPS if FP8 else (GROUPS + 1) // 2
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, width)
    present = (token < tokens)[:, None]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    if PTX:
        tl.extra.cuda.gdc_wait()  # for `quantize`, if it was launched with that in mind
    first = share * share_steps
    for step in range(first, tl.minimum(first + share_steps, steps)):
        codes = _load_words(words, tile, step, steps)
        for part in tl.static_range(parts):
            scale, zero = _load_grid(scales, zeros, tile, step, rows, part, count, GROUPS, ZEROS)
            weight = _decode(codes, scale, zero, part, GROUPS, count, ZEROS, FP8, LIMIT)
            at = step * COLUMNS + part * width + column
            mask = present if WHOLE else present & (at < features)[None, :]
            inputs = tl.load(x + token[:, None] * stride + at[None, :], mask=mask, other=0.0)
            if FP8:
                sums += tl.dot(weight, tl.trans(inputs), max_num_imprecise_acc=128)
            else:
                sums = tl.dot(weight, tl.trans(inputs), sums)
    if SPLIT == 1:
        _write(y, sums, channel_scale, token_scale, bias, tile, tokens, out, TOKENS, FP8, BIAS)
    else:
        tiles = tl.num_programs(0)
        cell = token[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
        mine = partial + (share * tiles + tile) * (ROWS * TOKENS)
        tl.store(mine + cell, sums, mask=(token < tokens)[None, :])
        tl.debug_barrier()  # all threads' sums before the arrival that publishes them
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            tl.store(arrived + tile, 0)
            total = tl.zeros((ROWS, TOKENS), tl.float32)
            for other in tl.range(0, SPLIT, loop_unroll_factor=128 // TOKENS):
                theirs = partial + (other * tiles + tile) * (ROWS * TOKENS)
                there = (token < tokens)[None, :]
                total += tl.load(theirs + cell, mask=there, other=0.0, cache_modifier=".cg")
            _write(y, total, channel_scale, token_scale, bias, tile, tokens, out, TOKENS, FP8, BIAS)


@triton.jit
def dequantize(
    weight: tl.tensor,  # [rows, steps * COLUMNS] e4m3, or bf16, written
    words: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    rows: tl.tensor,
    steps: tl.tensor,
    GROUPS: tl.constexpr,
    ZEROS: tl.constexpr,
    FP8: tl.constexpr,
    LIMIT: tl.constexpr,
) -> None:
    """Many tokens: Ŵ8, or the 16-bit weight, for the library. Grid: (steps, row tiles)."""
    step, tile = tl.program_id(0), tl.program_id(1)
    parts: tl.constexpr = 2 if FP8 else 4
    width: tl.constexpr = COLUMNS // parts
    count: tl.constexpr = GROUPS if FP8 else (GROUPS + 1) // 2
    codes = _load_words(words, tile, step, steps)
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    for part in tl.static_range(parts):
        scale, zero = _load_grid(scales, zeros, tile, step, rows, part, count, GROUPS, ZEROS)
        decoded = _decode(codes, scale, zero, part, GROUPS, count, ZEROS, FP8, LIMIT)
        at = step * COLUMNS + part * width + tl.arange(0, width)
        tl.store(weight + row[:, None] * (steps * COLUMNS) + at[None, :], decoded)


@triton.jit(do_not_specialize=["tokens"])
def quantize(
    x8: tl.tensor,  # [tokens, stride8] e4m3, written; zeros from `features` on
    token_scale: tl.tensor,  # [tokens] fp32, written
    x: tl.tensor,  # [tokens, features] bf16
    tokens: tl.tensor,
    input_scale: tl.tensor,  # fp32 scalar, if static
    features: tl.tensor,
    stride8: tl.tensor,
    maximum: tl.tensor,
    STATIC: tl.constexpr,
    TOKENS: tl.constexpr,  # of a program
    BLOCK: tl.constexpr,  # columns of a program: all, if the scale is dynamic
) -> None:
    """x8 = round(x / sx), as `W4A8Linear` divides and rounds. Grid: (tokens, columns)."""
    if PTX:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = (token < tokens)[:, None]
    mask = there & (at < features)
    values = tl.load(x + token[:, None] * features + at, mask=mask, other=0.0).to(tl.float32)
    if STATIC:
        scale = tl.load(input_scale) + tl.zeros((TOKENS,), tl.float32)
    else:
        amax = tl.max(tl.abs(values), 1)
        scale = tl.where(amax > 0, tl.div_rn(amax, maximum), 1.0)
    ratio = tl.div_rn(values, tl.broadcast_to(scale[:, None], (TOKENS, BLOCK)))
    x8_values = tl.clamp(ratio, -maximum, maximum, propagate_nan=tl.PropagateNan.ALL)
    mask = there & (at < stride8)
    tl.store(x8 + token[:, None] * stride8 + at, x8_values.to(tl.float8e4nv), mask=mask)
    if tl.program_id(1) == 0:
        tl.store(token_scale + token, scale, mask=token < tokens)
