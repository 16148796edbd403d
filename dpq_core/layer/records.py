"""What quantization makes of a linear layer."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpq_core.layer.grid import Grid
from dpq_core.recipe.scheme import Scheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as 4-bit codes and the grid that gives them meaning."""

    codes: Tensor  # [out, in] uint8, 0…15
    grid: Grid


@dataclass(frozen=True)
class RoundedWeight:
    """A weight in the 8-bit format of the arithmetic: Ŵ16 = channel_scale * values."""

    values: Tensor  # [out, in] float8_e4m3fn or int8
    channel_scale: Tensor  # [out, 1] fp32

    def decode(self) -> Tensor:
        """Ŵ16 [out, in] fp32."""
        return self.channel_scale * self.values.float()


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one layer.

    error: tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ), the output's relative squared error; W is the
    corrected weight where there is a correction.
    damp_frac: the damping that the factorisation took; the scheme's unless it had to grow.
    codes_moved: by gradient-aware rounding, over all passes.
    tokens: of calibration that the layer saw.
    kept: why it stays in 16 bits although its scheme asks for fewer; empty where it does not.
    corrected: by how much the correction moved the output before anything was rounded, measured as
    the error is.
    given_error: ‖W - Ŵ‖² / ‖W‖² where codes were given; the error is against the given W too.
    """

    error: float
    damp_frac: float
    codes_moved: int
    tokens: int = 0
    kept: str = ""
    corrected: float = 0.0
    given_error: float | None = None

    def as_row(self) -> dict[str, Any]:
        """For storage; `corrected` where there is a correction, `given_error` where codes were
        given."""
        row = asdict(self)
        if not self.corrected:
            del row["corrected"]
        if self.given_error is None:
            del row["given_error"]
        return row


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer: how it was quantized, its weight, and its static activation scale."""

    scheme: Scheme
    weight: QuantizedWeight | RoundedWeight | Tensor  # [out, in] of 16 bits where method is `none`
    input_scale: Tensor | None  # fp32 scalar; None: dynamic or 16-bit activations
    report: LayerReport

    @property
    def features(self) -> int:
        """Columns of the weight."""
        weight = self.weight
        if isinstance(weight, QuantizedWeight):
            return weight.codes.shape[1]
        return (weight.values if isinstance(weight, RoundedWeight) else weight).shape[1]

    def to(self, device: torch.device | str) -> "QuantizedLinear":
        """The same layer on a device."""
        scale = None if self.input_scale is None else self.input_scale.to(device)
        weight = self.weight
        if isinstance(weight, QuantizedWeight):
            weight = QuantizedWeight(weight.codes.to(device), weight.grid.to(device))
        elif isinstance(weight, RoundedWeight):
            weight = RoundedWeight(weight.values.to(device), weight.channel_scale.to(device))
        else:
            weight = weight.to(device)
        return replace(self, weight=weight, input_scale=scale)

    def decoded(self) -> Tensor:
        """Ŵ16 [out, in] fp32."""
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.grid.decode(self.weight.codes)
        if isinstance(self.weight, RoundedWeight):
            return self.weight.decode()
        return self.weight.float()
