"""What quantization makes of a linear layer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpq_core.layer.grid import Grid, joined_grids
from dpq_core.layer.unseen import UnseenErrors
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
    unseen: errors on tokens that no Hessian has seen, where there are such and codes were chosen.
    rounded: the codes are the nearest ones, which did better there.
    """

    error: float
    damp_frac: float
    codes_moved: int
    tokens: int = 0
    kept: str = ""
    corrected: float = 0.0
    given_error: float | None = None
    unseen: UnseenErrors | None = None
    rounded: bool = False

    def as_row(self) -> dict[str, Any]:
        """For storage, without the last four where there is nothing to say."""
        nothing = {"corrected": 0.0, "given_error": None, "unseen": None, "rounded": False}
        written = asdict(self).items()
        return {name: value for name, value in written if value != nothing.get(name, ...)}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "LayerReport":
        """Inverse of `as_row`."""
        unseen = row.get("unseen")
        return cls(**{**row, "unseen": unseen and UnseenErrors(**unseen)})


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

    @property
    def rows(self) -> int:
        """Outputs."""
        weight = self.weight
        if isinstance(weight, QuantizedWeight):
            return len(weight.codes)
        return len(weight.values if isinstance(weight, RoundedWeight) else weight)

    def some(self, rows: slice) -> "QuantizedLinear":
        """These outputs alone, in the same memory."""
        weight = self.weight
        if isinstance(weight, QuantizedWeight):
            weight = QuantizedWeight(weight.codes[rows], weight.grid.some(rows))
        elif isinstance(weight, RoundedWeight):
            weight = RoundedWeight(weight.values[rows], weight.channel_scale[rows])
        else:
            weight = weight[rows]
        return replace(self, weight=weight)

    def decoded(self) -> Tensor:
        """Ŵ16 [out, in] fp32."""
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.grid.decode(self.weight.codes)
        if isinstance(self.weight, RoundedWeight):
            return self.weight.decode()
        return self.weight.float()


def joined(parts: Sequence[QuantizedLinear], report: LayerReport) -> QuantizedLinear:
    """The layer that has the outputs of all parts, which have one scheme and one input scale."""
    weights = [part.weight for part in parts]
    weight: QuantizedWeight | RoundedWeight | Tensor
    if isinstance(weights[0], QuantizedWeight):
        own = [each for each in weights if isinstance(each, QuantizedWeight)]
        grids = [each.grid for each in own]
        weight = QuantizedWeight(torch.cat([each.codes for each in own]), joined_grids(grids))
    elif isinstance(weights[0], RoundedWeight):
        rounded = [each for each in weights if isinstance(each, RoundedWeight)]
        scales = torch.cat([each.channel_scale for each in rounded])
        weight = RoundedWeight(torch.cat([each.values for each in rounded]), scales)
    else:
        weight = torch.cat([each for each in weights if isinstance(each, Tensor)])
    return replace(parts[0], weight=weight, report=report)
