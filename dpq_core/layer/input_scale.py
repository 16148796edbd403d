"""One scale for a layer's 8-bit inputs: of all tokens by calibration, or of each by its values."""

import torch
from torch import Tensor

from dpq_core.arithmetic.formats import NumberFormat, round_to
from dpq_core.kernels.definitions import MAGNITUDES
from dpq_core.layer.grid import power_of_two_above
from dpq_core.recipe.scheme import Scheme


def static_input_scale(magnitudes: Tensor, fmt: NumberFormat, estimator: str) -> Tensor:
    """One scale for all of a layer's activations, from their histogram. FP32 scalar.

    Args:
        magnitudes: [2**15] int64, as counted by `InputStatistics`.
        fmt: 8-bit format of the activations.
        estimator: `amax`, the largest magnitude meets the format's maximum; `percentile`, 99.9 % of
            the values lie within it; `mse`, the least squared error among shrunk ranges.
    """
    values = torch.arange(MAGNITUDES, dtype=torch.int16).view(torch.bfloat16).float()
    present = magnitudes.cpu().nonzero().flatten()
    if len(present) == 0 or not torch.isfinite(values[present[-1]]):
        raise ValueError("no finite calibration activations to choose a static scale from")
    values, counts = values[present], magnitudes.cpu()[present].double()
    amax = values[-1]
    if amax == 0:
        return torch.ones((), dtype=torch.float32)
    if estimator == "percentile":
        cumulative = counts.cumsum(0) / counts.sum()
        amax = values[int(torch.searchsorted(cumulative, _PERCENTILE))]
        amax = amax if amax > 0 else values[-1]
    elif estimator == "mse":
        ranges = [values[-1] * share for share in _RANGE_SHARES]
        errors = [_rounding_error(values, counts, top / fmt.maximum, fmt) for top in ranges]
        amax = ranges[errors.index(min(errors))]
    return amax / fmt.maximum


_PERCENTILE = 0.999


_RANGE_SHARES = tuple(2 ** (-step / 8) for step in range(48))


def _rounding_error(values: Tensor, counts: Tensor, scale: Tensor, fmt: NumberFormat) -> float:
    residual = round_to(values / scale, fmt) * scale - values
    return float((residual.double().square() * counts).sum())


def static_scale_of(magnitudes: Tensor, scheme: Scheme) -> Tensor:
    """sx, the static activation scale that a scheme takes from the inputs' magnitudes [2**15]. FP32
    scalar."""
    assert scheme.inner_format is not None
    scale = static_input_scale(magnitudes, scheme.inner_format, scheme.activation_range)
    return power_of_two_above(scale) if scheme.power_of_two else scale


def token_scale(x: Tensor, maximum: float) -> Tensor:
    """Dynamic scale of each token, FP32: its largest magnitude meets `maximum`.

    [..., in] → [..., 1].
    """
    amax = x.abs().amax(-1, keepdim=True).float()
    limit = torch.full_like(amax, maximum)  # by a plain number CUDA multiplies by its reciprocal
    return torch.where(amax > 0, amax / limit, torch.ones_like(amax))
