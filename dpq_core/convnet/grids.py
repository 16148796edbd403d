"""Grids of integers, and modules that round to them: in a float network, a value x is

    x̂ = s · (q − z),   q = clamp(round(x / s) + z, low, high)                (whitepaper, section 2)

    weights      per channel or layer; symmetric −(2ᵇ⁻¹−1) … 2ᵇ⁻¹−1, or affine −2ᵇ⁻¹ … 2ᵇ⁻¹−1
    activations  per layer, affine, 0 … 2ᵇ−1

Gradients go through as if nothing had been rounded, but for what is clamped (straight-through).
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dpq_core.convnet.ranges import Range
from dpq_core.convnet.recipe import WeightScheme

_SMALLEST_SCALE = 2.0**-24


@dataclass(frozen=True)
class Codes:
    """The integers of a grid: `low` to `high`, both included. bits: of each where it is stored."""

    low: int
    high: int
    bits: int

    @property
    def signed(self) -> bool:
        return self.low < 0


def activation_codes(bits: int) -> Codes:
    return Codes(0, 2**bits - 1, bits)


def weight_codes(scheme: WeightScheme) -> Codes:
    """With `reduce_range` a bit is left out, and the storage stays."""
    half = 2 ** (scheme.bits - 1 - bool(scheme.reduce_range))
    return Codes(1 - half if scheme.symmetric else -half, half - 1, scheme.bits)


def affine_grid(low: Tensor, high: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Scales fp32 and zero points int32 of ranges that are widened to hold zero, which is exact."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (codes.high - codes.low)).clamp(min=_SMALLEST_SCALE)
    zero = (codes.low - low / scale).round().clamp(codes.low, codes.high)
    return scale, zero.to(torch.int32)


def symmetric_grid(amax: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Scales fp32 and zero points, 0, of ranges −amax … amax."""
    scale = (amax / codes.high).clamp(min=_SMALLEST_SCALE)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


ROUND = "dpq::Round"  # what a rounding is in an exported graph


def rounded(x: Tensor, scale: Tensor, zero: Tensor, codes: Codes) -> Tensor:
    """x̂, fp32 as x.

    Args:
        scale, zero: [1], or [channels] of x's first dimension.
    """
    if torch.compiler.is_exporting():
        about: dict[str, Any] = {"low": codes.low, "high": codes.high}
        return torch.onnx.ops.symbolic(
            ROUND, (x, scale, zero), about, dtype=x.dtype, shape=x.shape, version=1
        )
    found: Tensor = _StraightThrough.apply(x, scale, zero, codes)
    return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, scale: Tensor, zero: Tensor, codes: Codes) -> Tensor:
        scale, zero = _by_channel(scale, x), _by_channel(zero, x)
        steps = torch.round(x / scale).add_(zero)
        context.save_for_backward((steps >= codes.low) & (steps <= codes.high))
        return steps.clamp_(codes.low, codes.high).sub_(zero).mul_(scale)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = context.saved_tensors
        return gradients[0] * inside, None, None, None


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.dim() - 1))


class WeightRounding(nn.Module):
    """A weight on the grid of its own values: of each of its channels (dimension 0), or of all."""

    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, scheme: WeightScheme) -> None:
        super().__init__()
        self.scheme, self.codes = scheme, weight_codes(scheme)
        self.register_buffer("scale", None)
        self.register_buffer("zero", None)

    def forward(self, weight: Tensor) -> Tensor:
        """[channels, …] fp32, rounded."""
        scale, zero = self.scale, self.zero
        if scale is None or zero is None:
            scale, zero = self.grid(weight)
        return rounded(weight, scale, zero, self.codes)

    def settle(self, weight: Tensor) -> None:
        """From here on the grid is that of the weight as it is now."""
        self.scale, self.zero = self.grid(weight)

    @torch.no_grad()
    def grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points, [channels], or [1] of a layer."""
        flat = weight.detach().flatten(1)
        low, high = flat.amin(1), flat.amax(1)
        if self.scheme.per == "layer":
            low, high = low.amin()[None], high.amax()[None]
        if self.scheme.symmetric:
            return symmetric_grid(torch.maximum(-low, high), self.codes)
        return affine_grid(low, high, self.codes)


class Mode(Enum):
    """What a rounding of activations does with what goes through it."""

    WATCH = "watch"  # takes its range, and hands it on as it is
    TRAIN = "train"  # takes its range, and rounds
    ROUND = "round"


class Rounding(nn.Module):
    """Activations on one grid, whose range is taken from what was seen."""

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int, seen: Range) -> None:
        super().__init__()
        self.codes, self.seen, self.mode = activation_codes(bits), seen, Mode.WATCH
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero", torch.zeros(1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is not Mode.ROUND:
            self.seen.update(x.detach())
            if self.mode is Mode.WATCH:
                return x
            self.settle()
        return rounded(x, self.scale, self.zero, self.codes)

    def settle(self) -> None:
        """The grid of the range as it is now."""
        low, high = self.seen.ends(self.codes.high - self.codes.low)
        scale, zero = affine_grid(low, high, self.codes)
        self.scale.copy_(scale)
        self.zero.copy_(zero)

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest value of the grid."""
        scale, zero = float(self.scale), int(self.zero)
        return scale * (self.codes.low - zero), scale * (self.codes.high - zero)
