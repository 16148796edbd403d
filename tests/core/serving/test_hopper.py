"""The Hopper runtime: layout, shares, refusals; its kernels compiled for SM90, and, by
`hopper_cases.py`, run in Triton's interpreter."""

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from compiled_kernels import by_tool, resources

from dpq_core.arithmetic.formats import FORMATS, round_to
from dpq_core.errors import InputError
from dpq_core.layer.grid import choose_grid
from dpq_core.layer.quantize import round_weight
from dpq_core.layer.records import LayerReport, QuantizedLinear, QuantizedWeight
from dpq_core.recipe.scheme import Scheme
from dpq_core.serving import hopper
from dpq_core.serving.hopper_packing import choose_split, fp16_scales, pack_words

CASES = Path(__file__).with_name("hopper_cases.py")


def layer(rows=64, features=256, **changes):
    scheme = Scheme(**{"method": "rtn", "rounding": "nearest", **changes})
    weight = torch.randn(rows, features, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(0.1) if scheme.activations == "static" else None
    if scheme.method == "none":
        stored = weight.bfloat16()
    elif scheme.bits == 8:
        stored = round_weight(weight, scheme)
    else:
        codes = torch.zeros(rows, features, dtype=torch.uint8)
        stored = QuantizedWeight(codes, choose_grid(weight, scheme, None))
    return QuantizedLinear(scheme, stored, scale, LayerReport(0.0, 0.0, 0))


def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def test_every_scale_of_bf16_has_an_fp16_one_that_decodes_the_same():
    scales = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    e4m3 = FORMATS["e4m3"]
    steps = torch.arange(1, 16).float()
    products = (fp16_scales(scales).float()[:, None] * steps).to(torch.float16)
    assert torch.equal(round_to(products, e4m3), round_to(scales.float()[:, None] * steps, e4m3))
    # What makes it more than a conversion: rounding twice is not rounding once.
    plain = scales.float().clamp(max=4096).to(torch.float16).float()[:, None] * steps
    once, twice = (scales.float()[:, None] * steps, plain.to(torch.float16))
    assert (round_to(twice, e4m3) != round_to(once, e4m3)).any(1).sum() == 31


def test_scales_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="group scale nan has no FP16 equivalent"):
        fp16_scales(torch.tensor([1.0, float("nan")], dtype=torch.bfloat16))


@pytest.mark.parametrize("run", [4, 2])
def test_codes_stand_where_a_warp_of_wgmma_reads_them(run):
    """Against the definition of the layout, code by code, in two row tiles and two blocks."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (256, 512), generator=generator, dtype=torch.uint8)
    words = pack_words(codes, run).long()
    for row, column in torch.randint(1 << 20, (500, 2), generator=generator).tolist():
        row, column = row % 256, column % 512
        tile, w, h, r = row // 128, row % 128 // 16, row % 16 // 8, row % 8
        block, width = column // 256, 32 * run
        part, inside = divmod(column % 256, width)
        word, place = divmod(inside, run)
        pair = part * run // 2 + place // 2
        t, q = divmod(word, 4)
        position = ((h * 2 + t // 4) * 256 + w * 32 + r * 4 + q) * 4 + t % 4
        found = int(words[tile, block, position]) >> (16 * (place % 2) + 4 * pair) & 15
        assert found == codes[row, column]


@pytest.mark.parametrize("processors", [114, 132])
@pytest.mark.parametrize("tiles", [1, 32, 64, 112, 224, 1000])
def test_shares_of_the_columns_are_not_empty(tiles, processors):
    for steps, tokens in itertools.product((1, 2, 16, 32, 56), (16, 32, 64, 128)):
        split = choose_split(tiles, steps, tokens, processors)
        assert 1 <= split <= 16
        assert (split - 1) * -(-steps // split) < steps


@pytest.mark.parametrize(
    ("out", "features", "tokens", "split"),
    [
        (4096, 14336, 16, 8),  # 32 row tiles: too few for 132 processors
        (8192, 8192, 16, 4),
        (28672, 8192, 128, 1),  # the sums of 128 tokens would outweigh the codes
    ],
)
def test_few_rows_share_their_columns(out, features, tokens, split):
    assert choose_split(out // 128, features // 256, tokens, 132) == split


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"symmetric": True, "activations": "dynamic"}, ""),
        ({"bits": 8}, ""),
        ({"inner": "none", "activations": "none"}, ""),
        ({"method": "none"}, "16-bit weights, which an ordinary linear multiplies"),
        ({"inner": "int8"}, "no INT8 kernel"),
        ({"activations": "none"}, "E4M3 weights, but 16-bit activations"),
        ({"group_size": 48}, "group_size 48: the kernels take multiples of 32"),
    ],
    ids=str,
)
def test_what_there_are_kernels_for(changes, said):
    one = layer(**changes)
    reason = hopper.refusal(one)
    assert reason.startswith(said)
    assert bool(reason) == bool(said)
    if said:
        with pytest.raises(InputError, match="no kernel for this layer"):
            hopper.make(one, None)


def test_other_types_than_bf16_are_refused():
    with pytest.raises(InputError, match=r"the bias is torch\.float32"):
        hopper.make(layer(), torch.zeros(64))
    with pytest.raises(InputError, match=r"the input is torch\.float16"):
        hopper.make(layer(), None)(torch.zeros(1, 256, dtype=torch.float16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so():
    assert hopper.unavailable() == "torch finds no CUDA device"


def compiled(kernel, types, constants, stages):
    """A kernel for SM90, by the compiler and the assembler that come with Triton: no device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    missing = {name: None for name in names if name not in types}
    aligned = [
        name for name in names if types.get(name, "")[:1] == "*" or name in ("rows", "stride")
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, missing | constants, attributes)
    options = {"num_warps": 8, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main_loop(cubin, folder):
    """How often each instruction stands in the loop that multiplies."""
    lines = by_tool("nvdisasm", cubin, folder, "-c").splitlines()
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if line.startswith(".L_x")}
    for end, line in enumerate(lines):
        branch = re.search(r"BRA `\((\.L_x_\d+)\)", line)
        if branch and (start := labels.get(branch[1], end)) < end:
            body = "\n".join(lines[start : end + 1])
            if "GMMA" in body:
                return Counter(re.findall(r"\*/ +(?:@\S+ )?([A-Z]\w+)[. ]", body))
    raise AssertionError("no loop multiplies")


INTEGERS = ("tokens", "out", "rows", "features", "stride", "steps", "share_steps")
POINTERS = {
    "y": "*bf16",
    **dict.fromkeys(("words", "scales", "zeros", "arrived"), "*i32"),
    **dict.fromkeys(("channel_scale", "token_scale", "partial"), "*fp32"),
    "bias": "*bf16",
}


@pytest.mark.parametrize(
    ("tile", "fp8"),
    [
        *((tile, True) for tile in hopper._TILES),
        (hopper._TILES[0], False),
        (hopper._TILES[-1], False),
    ],
    ids=lambda value: f"{value.tokens} tokens" if isinstance(value, hopper.Tile) else str(value),
)
def test_multiply_compiles_for_hopper(tile, fp8, tmp_path, monkeypatch):
    """The tensor cores' instruction for this chip, the packed conversion, no layout exchanged
    through shared memory, nothing spilled, and at few tokens registers for two programs or three.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = hopper._kernels()
    types = POINTERS | dict.fromkeys(INTEGERS, "i32") | {"x": "*fp8e4nv" if fp8 else "*bf16"}
    constants = {
        "TOKENS": tile.tokens, "GROUPS": 1, "ZEROS": True, "FP8": fp8, "LIMIT": 448,
        "BIAS": True, "WHOLE": True, "SPLIT": 4,
    }  # fmt: skip
    stages = tile.stages if fp8 else tile.stages16
    kernel = compiled(kernels.multiply, types, constants, stages)
    ptx = kernel.asm["ptx"]
    operands, depth = ("e4m3.e4m3", 32) if fp8 else ("bf16.bf16", 16)
    assert f"wgmma.mma_async.sync.aligned.m64n{tile.tokens}k{depth}.f32.{operands}" in ptx
    assert ("cvt.rn.satfinite.e4m3x2.f16x2" in ptx) == fp8
    assert "mma.sync" not in ptx  # of earlier chips
    assert ptx.index("griddepcontrol.wait") < ptx.index("cp.async")  # inputs are there by then
    assert "stmatrix" not in ptx
    registers, stack = resources(kernel.asm["cubin"], tmp_path)
    assert stack == 0
    assert registers <= {16: 80 if fp8 else 128, 32: 128}.get(tile.tokens, 255)
    assert kernel.metadata.shared <= 227 * 1024
    loop = main_loop(kernel.asm["cubin"], tmp_path)
    assert loop["HADD2"] == loop["HMUL2"] == 64  # two codes each, of a thread's 128
    assert (loop["F2FP"], loop["QGMMA"], loop["HGMMA"]) == ((64, 8, 0) if fp8 else (0, 0, 16))
    if tile.tokens == 16:
        assert loop.total() <= 3.6 * 128  # what `hopper_kernels` says of the bandwidth's limit
