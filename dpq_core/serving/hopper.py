"""W4A8 (and W4A16, W8A8) linears on Hopper GPUs: Triton kernels and the library's FP8 product.

    few tokens    x8, sx = quantize(x);  y = multiply(x8, codes)        codes decoded on the way
    many tokens   x8, sx = quantize(x);  Ŵ8 = dequantize(codes);  y = torch._scaled_mm(x8, Ŵ8ᵀ)

One token reads each code once and is bound by memory: 0.52 bytes a weight against BF16's two. With
many, reading is shared, and what counts is the product, which the library does best: it writes and
reads Ŵ8 once more, 1.5 bytes a weight. That is as long as `multiply` takes for 128 more tokens, by
the count of instructions in `hopper_kernels`; `make bench-gpu` measures where they cross.

Ŵ8 is held while its layer is computed. Torch's allocator, whose order is that of the stream (and
inside a CUDA graph, of the graph), gives the next layer the same memory: one layer's worth,
whatever the model. Nothing waits for the device and shapes alone decide what is launched, so that a
CUDA graph can hold all of it; for `torch.compile` each linear is one operator.

Kernels and layout: `hopper_kernels`, `hopper_packing`. Definition: `dpq_core.layer.linear`.
"""

import functools
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dpq_core.errors import InputError
from dpq_core.layer.records import QuantizedLinear, QuantizedWeight, RoundedWeight
from dpq_core.serving.hopper_packing import COLUMNS, ROWS, SMALLEST_GROUP, choose_split, pack
from dpq_core.serving.runtimes import other_arithmetic

FEW_TOKENS = 128  # up to which codes are decoded as they are multiplied
PROCESSORS = 132  # of an H100 or H200, where there is no device to ask
_MULTIPLE = 16  # of the library's FP8 product: rows and columns of the weight
_STATIC_BLOCK = 2048  # columns of a program that quantizes with a static scale
_PROGRAM = 1 << 14  # elements of a program that quantizes several tokens
# Elements of a thread that quantizes: with few tokens all threads there are, with many several
# programs a processor, whose loads and stores take turns.
_FEW_A_THREAD, _MANY_A_THREAD = 16, 64


@dataclass(frozen=True)
class Tile:
    """Tokens of a program of `multiply`; blocks in shared memory for E4M3, and for 16 bits.

    By registers and shared memory of the compiled kernels, three programs fit a processor at 16
    tokens, two at 32, one above. A table, not a search at run time: searching launches kernels,
    which a CUDA graph would record. 16 tokens is the least that Triton gives `wgmma`.
    """

    tokens: int
    stages: int
    stages16: int


_TILES = (Tile(16, 4, 4), Tile(32, 4, 3), Tile(64, 3, 3), Tile(128, 3, 2))


def unavailable() -> str:
    """Why the kernels cannot run here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    found = torch.cuda.get_device_capability()
    if found != (9, 0):
        return f"compute capability {found[0]}.{found[1]}, and the kernels are for Hopper's 9.0"
    return ""


def refusal(layer: QuantizedLinear) -> str:
    """Why there is no kernel for a layer, or nothing."""
    weight = layer.weight
    if reason := other_arithmetic(layer, "kernel"):
        return reason
    if isinstance(weight, QuantizedWeight) and weight.grid.group_size % SMALLEST_GROUP:
        size = weight.grid.group_size
        return f"group_size {size}: the kernels take multiples of {SMALLEST_GROUP}"
    return ""


def make(layer: QuantizedLinear, bias: Tensor | None) -> nn.Module:
    """The layer's module.

    Raises:
        InputError: a bias that is not BF16, or what `refusal` says.
    """
    if reason := refusal(layer):
        raise InputError(f"the hopper runtime has no kernel for this layer: {reason}")
    if bias is not None and bias.dtype != torch.bfloat16:
        raise InputError(f"the bias is {bias.dtype}, the kernels' is torch.bfloat16: load in BF16")
    if isinstance(layer.weight, QuantizedWeight):
        return FourBitLinear(layer, layer.weight, bias)
    assert isinstance(layer.weight, RoundedWeight)
    return EightBitLinear(layer, layer.weight, bias)


class HopperLinear(nn.Module):
    """What both kinds of weight share: scales, bias, the shape of what goes in and comes out."""

    channel_scale: Tensor  # [out, padded to 16] fp32
    input_scale: Tensor | None  # fp32 scalar; None: one a token
    bias: Tensor | None  # [out, padded to 16] bf16

    def __init__(
        self, layer: QuantizedLinear, shape: torch.Size, scale: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        inner = layer.scheme.inner_format
        self.maximum = inner.maximum if inner else 0.0
        missing = -self.out_features % _MULTIPLE
        self.register_buffer("channel_scale", pad(scale.flatten().float(), (0, missing), value=1.0))
        self.register_buffer("input_scale", layer.input_scale)
        self.register_buffer("bias", None if bias is None else pad(bias.detach(), (0, missing)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] bf16 → [..., out] bf16.

        Raises:
            InputError: x of another type.
        """
        if x.dtype != torch.bfloat16:
            raise InputError(f"the input is {x.dtype}, the kernels' is torch.bfloat16")
        y = self.multiply(x.reshape(-1, self.in_features).contiguous())
        return y.view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Tensor) -> Tensor:
        """[tokens, in] → [tokens, out]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        scale = "no" if not self.maximum else "dynamic" if self.input_scale is None else "static"
        return f"{self.in_features}, {self.out_features}, {scale} input scale"


class FourBitLinear(HopperLinear):
    """4-bit codes: E4M3 arithmetic (W4A8), or 16 bits (W4A16). One stream at a time calls it:
    `arrived` is shared by the programs of a call."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    arrived: Tensor  # [row tiles] int32: zero, but while programs share a row tile's columns

    def __init__(
        self, layer: QuantizedLinear, weight: QuantizedWeight, bias: Tensor | None
    ) -> None:
        super().__init__(layer, weight.codes.shape, weight.grid.channel_scale, bias)
        packed = pack(weight)
        self.groups, self.limit = packed.groups, packed.limit
        self.register_buffer("words", packed.words)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zeros", packed.zeros)
        arrived = torch.zeros(len(packed.words), dtype=torch.int32, device=packed.words.device)
        self.register_buffer("arrived", arrived, persistent=False)

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = four_bits(
            x, self.words, self.scales, self.zeros, self.channel_scale, self.input_scale, self.bias,
            self.arrived, self.out_features, self.groups, self.limit, self.maximum,
        )  # fmt: skip
        return y


class EightBitLinear(HopperLinear):
    """E4M3 weights (W8A8): the library's product."""

    weight8: Tensor  # [out, in] e4m3, both padded to 16

    def __init__(self, layer: QuantizedLinear, weight: RoundedWeight, bias: Tensor | None) -> None:
        super().__init__(layer, weight.values.shape, weight.channel_scale, bias)
        rows, features = weight.values.shape
        bytes_ = weight.values.view(torch.uint8)  # 0 is zero in E4M3 as well
        padded = pad(bytes_, (0, -features % _MULTIPLE, 0, -rows % _MULTIPLE))
        self.register_buffer("weight8", padded.view(torch.float8_e4m3fn))

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = eight_bits(
            x, self.weight8, self.channel_scale, self.input_scale, self.bias,
            self.out_features, self.maximum,
        )  # fmt: skip
        return y


# `arrived` is written and zero again at the end, so that for whoever calls nothing is mutated.
@torch.library.custom_op("dpq::hopper_four_bits", mutates_args=())
def four_bits(
    x: Tensor,  # [tokens, in] bf16
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    channel_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    arrived: Tensor,
    out: int,
    groups: int,
    limit: int,
    maximum: float,  # of E4M3; 0: 16-bit arithmetic
) -> Tensor:
    """A linear of 4-bit codes. [tokens, out] bf16."""
    tokens, features = x.shape
    if not tokens:
        return x.new_empty(0, out)
    tiles, steps, _ = words.shape
    rows, fp8 = tiles * ROWS, maximum > 0
    kernels = _kernels()
    grid = {"GROUPS": groups, "ZEROS": zeros is not None, "FP8": fp8, "LIMIT": limit}
    inputs, token_scale = x, None
    if fp8:
        inputs, token_scale = _quantized(x, steps * COLUMNS, input_scale, maximum)
    if tokens <= FEW_TOKENS:
        y = x.new_empty(tokens, out)
        tile = next(tile for tile in _TILES if tile.tokens >= tokens)
        split = choose_split(tiles, steps, tile.tokens, _processors(x.device))
        partial = None
        if split > 1:
            shape = (split, tiles, tile.tokens, ROWS)
            partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        kernels.multiply[tiles, split](
            y, inputs, words, scales, zeros, channel_scale, token_scale, bias, partial, arrived,
            tokens, out, rows, features, inputs.shape[1], steps, -(-steps // split),
            TOKENS=tile.tokens, BIAS=bias is not None, WHOLE=inputs.shape[1] % COLUMNS == 0,
            SPLIT=split, num_warps=kernels.WARPS,
            num_stages=tile.stages if fp8 else tile.stages16, **grid, **_early(kernels, fp8),
        )  # fmt: skip
        return y
    kind = torch.float8_e4m3fn if fp8 else torch.bfloat16
    weight = torch.empty(rows, steps * COLUMNS, dtype=kind, device=x.device)
    kernels.dequantize[steps, tiles](
        weight, words, scales, zeros, rows, steps, num_warps=kernels.WARPS, **grid
    )
    if token_scale is None:
        trimmed = None if bias is None else bias[:out]
        return nn.functional.linear(x, weight[:out, :features], trimmed)
    return _product(inputs, weight[: len(channel_scale)], token_scale, channel_scale, bias, out)


@torch.library.custom_op("dpq::hopper_eight_bits", mutates_args=())
def eight_bits(
    x: Tensor,  # [tokens, in] bf16
    weight: Tensor,
    channel_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    out: int,
    maximum: float,
) -> Tensor:
    """A linear of E4M3 weights. [tokens, out] bf16."""
    if not len(x):
        return x.new_empty(0, out)
    x8, token_scale = _quantized(x, weight.shape[1], input_scale, maximum)
    return _product(x8, weight, token_scale, channel_scale, bias, out)


@four_bits.register_fake
def _(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, channel_scale: Tensor,
      input_scale: Tensor | None, bias: Tensor | None, arrived: Tensor, out: int, groups: int,
      limit: int, maximum: float) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out)


@eight_bits.register_fake
def _(x: Tensor, weight: Tensor, channel_scale: Tensor, input_scale: Tensor | None,
      bias: Tensor | None, out: int, maximum: float) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out)


def _quantized(
    x: Tensor,  # [tokens, in] bf16
    width: int,
    input_scale: Tensor | None,
    maximum: float,
) -> tuple[Tensor, Tensor]:
    """x8 [tokens, width] e4m3, zeros beyond x's columns; sx [tokens] fp32."""
    kernels = _kernels()
    tokens, features = x.shape
    x8 = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=x.device)
    token_scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    static, row = input_scale is not None, 1 << (width - 1).bit_length()
    block = min(row, _STATIC_BLOCK) if static else row
    few = tokens <= FEW_TOKENS
    each = 1 if few else max(1, _PROGRAM // block)
    warps = each * block // (32 * (_FEW_A_THREAD if few else _MANY_A_THREAD))
    warps = min(32, max(4, warps))
    kernels.quantize[-(-tokens // each), -(-width // block)](
        x8, token_scale, x, tokens, input_scale, features, width, maximum,
        STATIC=static, TOKENS=each, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return x8, token_scale


def _product(
    x8: Tensor,  # [tokens, in] e4m3
    weight8: Tensor,  # [out, in] e4m3, padded
    token_scale: Tensor,
    channel_scale: Tensor,
    bias: Tensor | None,
    out: int,
) -> Tensor:
    """The library's FP8 product, its sums taken out of the tensor cores' accumulators in time."""
    y = torch._scaled_mm(
        x8,
        weight8.t(),
        scale_a=token_scale[:, None],
        scale_b=channel_scale[None, :],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return y if y.shape[1] == out else y[:, :out].contiguous()


def _early(kernels: ModuleType, after_ours: bool) -> dict[str, bool]:
    """Launch option: begin while the kernel before runs, which `multiply` waits for itself."""
    return {"launch_pdl": True} if after_ours and not kernels.INTERPRETED else {}


def _kernels() -> ModuleType:
    """Imported at the first use: Triton is not everywhere where this module is."""
    return importlib.import_module("dpq_core.serving.hopper_kernels")


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
