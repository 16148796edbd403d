"""Keys and values as an engine keeps them in FP8: E4M3 with static scales.

    kept = round_e4m3(x / s)          x: a key or a value, after norms and rotary embeddings
    read = s · kept
    s    = the least power of two with s · 448 ≥ max |x|, of the calibration's keys (values):
           one for all of a layer's heads, or one a head

Engines divide in FP32 (vLLM) or in the model's type (compressed-tensors). By a power of two these
are the same numbers. A floating-point format loses nothing by it but less than an octave of the
fifteen in which E4M3 has its four bits; and two such scales round alike wherever neither saturates
nor comes down to subnormal numbers, whether they are a layer's or a head's. No scale is below 2⁻¹⁴,
the least normal number of FP16, so that every 16-bit type holds it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpq_core.arithmetic.formats import quantize
from dpq_core.layer.grid import power_of_two_above
from dpq_core.number_formats import FORMATS

E4M3 = FORMATS["e4m3"]
_LEAST = 2.0**-14
CACHE_MAXIMA = ("cache_keys", "cache_values")  # names in storage
KEY_SCALE, VALUE_SCALE = "k_scale", "v_scale"  # in checkpoints, after the attention's


@dataclass
class CacheMaxima:
    """The largest magnitudes that calibration saw of an attention's keys and values, [heads, size]
    fp32 each. Mergeable, in any order."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> "CacheMaxima":
        """Of keys and values [batch, heads, tokens, size]."""
        found = (x.abs().amax(dim=(0, 2)).float().cpu() for x in (keys, values))
        return cls(*found)

    def add(self, other: "CacheMaxima") -> None:
        """Those of both."""
        self.keys = torch.maximum(self.keys, other.keys)
        self.values = torch.maximum(self.values, other.values)

    def scales(self, per: Literal["tensor", "head"]) -> "CacheScales":
        """Raises ValueError: a maximum is not finite."""
        return CacheScales(_scale(self.keys, per), _scale(self.values, per))

    def tensors(self) -> dict[str, Tensor]:
        """For storage; `from_tensors` is the inverse."""
        return dict(zip(CACHE_MAXIMA, (self.keys, self.values), strict=True))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "CacheMaxima | None":
        """None: the tensors have none."""
        if CACHE_MAXIMA[0] not in tensors:
            return None
        return cls(*(tensors[name] for name in CACHE_MAXIMA))


@dataclass(frozen=True)
class CacheScales:
    """Of an attention's keys and values: [1], or [heads, 1, 1], powers of two, fp32."""

    keys: Tensor
    values: Tensor

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """As checkpoints store them, by the name that follows the attention's."""
        return {KEY_SCALE: self.keys.to(dtype), VALUE_SCALE: self.values.to(dtype)}


def _scale(maxima: Tensor, per: Literal["tensor", "head"]) -> Tensor:
    if not torch.isfinite(maxima).all():
        raise ValueError("keys or values of the calibration are not finite")
    amax = maxima.amax().view(1) if per == "tensor" else maxima.amax(1).view(-1, 1, 1)
    return power_of_two_above((amax / E4M3.maximum).clamp(min=_LEAST))


def as_kept(
    x: Tensor,  # [batch, heads, tokens, size]
    scale: Tensor,  # [1] or [heads, 1, 1]
) -> Tensor:
    """Keys or values as attention reads them from the cache, of their own type."""
    scale = scale.float()
    return (quantize(x, scale, E4M3) * scale).to(x.dtype)
