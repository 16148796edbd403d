"""Quantize one linear layer: the whole of DPQ and of what it is compared with.

`quantize_layer` takes a weight, the statistics of its inputs and a scheme. It walks no model and
touches no file. Layers that read one input share what comes of it (`dpq_core.layer.shared_input`).

Steps as in DESIGN: grid from the weight (corrected for what was quantized before it, where the
recipe says so: `dpq_core.layer.correction`), column loop in the order π, gradient-aware
rounding, order undone. Group scales belong to the stored column order (static groups), so that
every order is free at inference.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.arithmetic.formats import round_to
from dpq_core.layer.column_loop import quantize_columns
from dpq_core.layer.gradient_rounding import refine_codes, residual
from dpq_core.layer.grid import Grid, choose_channel_scale, choose_grid, power_of_two_above
from dpq_core.layer.hessian import InputStatistics, static_input_scale
from dpq_core.layer.shared_input import SharedInput
from dpq_core.recipe.layer_choices import chosen_scheme
from dpq_core.recipe.scheme import METHODS, OrderName, Scheme


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
    """

    error: float
    damp_frac: float
    codes_moved: int
    tokens: int = 0
    kept: str = ""
    corrected: float = 0.0

    def as_row(self) -> dict[str, Any]:
        """For storage; `corrected` where there is a correction."""
        row = asdict(self)
        return row if self.corrected else {k: v for k, v in row.items() if k != "corrected"}


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


def quantize_or_keep(
    weight: Tensor,  # [out, in], any float type
    inputs: SharedInput,
    scheme: Scheme,
    min_tokens_per_input: float,
    correction: float = 0.0,
) -> QuantizedLinear:
    """Quantize a layer, or keep it in 16 bits where its scheme says so: FP16 as it is, all else in
    BF16. One (a rarely chosen expert) that saw no calibration token, or fewer than
    `min_tokens_per_input` for each of its inputs, is kept too; its report says so.

    A Hessian of fewer tokens than inputs is singular: compensation fits these tokens, and on others
    does worse than no compensation (`docs/log.md`).

    Args:
        correction: the share of it that is taken, see `dpq_core.layer.correction`.

    Raises:
        ValueError, FactorizationError: as `quantize_layer`.
    """
    tokens, features, kept = inputs.tokens, inputs.features, ""
    if tokens == 0 or tokens < min_tokens_per_input * features:
        kept = (
            f"saw {tokens} calibration tokens for {features} inputs, and "
            f"calibration.min_tokens_per_input is {min_tokens_per_input:g}"
        )
        scheme = chosen_scheme(scheme, "bf16")
    layer = _quantized(weight, inputs, scheme, correction)
    return replace(layer, report=replace(layer.report, tokens=tokens, kept=kept))


def quantize_layer(
    weight: Tensor,  # [out, in], any float type
    statistics: InputStatistics,
    scheme: Scheme,
    correction: float = 0.0,
) -> QuantizedLinear:
    """Quantize a layer's weight and choose its activation scale. A correction as above.

    Raises:
        ValueError: weight or statistics are not finite, or their shapes do not fit.
        FactorizationError: the Hessian cannot be factorised; nothing falls back to rounding.
    """
    return _quantized(weight, SharedInput(statistics), scheme, correction)


def _quantized(
    weight: Tensor, inputs: SharedInput, scheme: Scheme, correction: float
) -> QuantizedLinear:
    if weight.ndim != 2 or weight.shape[1] != inputs.features:
        raise ValueError(
            f"weight {list(weight.shape)} does not fit inputs of {inputs.features} features"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite values")
    input_scale = _input_scale(inputs.magnitudes, scheme)
    if scheme.method == "none":
        kept = weight if weight.dtype == torch.float16 else weight.to(torch.bfloat16)
        return QuantizedLinear(scheme, kept, input_scale, LayerReport(0.0, scheme.damp_frac, 0))
    weight = weight.detach().float()
    change, damped = _correction(weight, inputs, scheme, correction)
    if change is not None:
        weight = weight + change
    if scheme.bits == 8:
        rounded, hessian = round_weight(weight, scheme), inputs.hessian()
        error = _relative(rounded.decode().sub_(weight).T, weight.T, hessian)
        corrected = 0.0 if change is None else _relative(change.T, weight.T, hessian)
        report = LayerReport(error, damped, 0, corrected=corrected)
        return QuantizedLinear(scheme, rounded, input_scale, report)
    diagonal = inputs.diagonal()
    grid = choose_grid(weight, scheme, diagonal)
    order = column_order(diagonal, scheme.order, scheme.group_size)
    weight = weight.index_select(1, order).T.contiguous()
    hessian = inputs.hessian(order)
    scale, corrected = max(objective(weight, hessian), _TINY), 0.0
    if change is not None:
        corrected = objective(change.index_select(1, order).T, hessian) / scale
        del change
    codes, damp_frac, moved = _choose_codes(weight, inputs, order, grid.at(order), scheme)
    error = objective(residual(codes, weight, grid.at(order)), hessian) / scale
    stored = codes.to(torch.uint8).index_select(0, order.argsort()).T.contiguous()
    report = LayerReport(error, max(damp_frac, damped), moved, corrected=corrected)
    return QuantizedLinear(scheme, QuantizedWeight(stored, grid), input_scale, report)


def _correction(
    weight: Tensor,  # [out, in] fp32
    inputs: SharedInput,
    scheme: Scheme,
    share: float,
) -> tuple[Tensor | None, float]:
    """c W M [out, in] fp32, None without a correction, and the damping that it took."""
    if not share:
        return None, scheme.damp_frac
    recovered, damping = inputs.recovery(scheme.damp_frac)
    return (weight @ recovered).mul_(share), damping


def round_weight(weight: Tensor, scheme: Scheme) -> RoundedWeight:
    """A weight [out, in] fp32 in the inner format, to nearest: eight bits need no compensation."""
    inner = scheme.inner_format
    assert inner is not None
    scale = choose_channel_scale(weight, scheme, inner.maximum)
    stored = torch.float8_e4m3fn if inner.is_float else torch.int8
    return RoundedWeight(round_to(weight / scale, inner).to(stored), scale)


_TINY = torch.finfo(torch.float32).tiny


def _relative(residual: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """The layer's relative error, of a transposed residual and weight [in, out]."""
    return objective(residual, hessian) / max(objective(weight, hessian), _TINY)


def objective(residual: Tensor, hessian: Tensor) -> float:
    """tr(Dᵀ H D) of a transposed residual D [in, out], from one half of H, which is symmetric."""
    total = torch.zeros((), dtype=torch.float64, device=hessian.device)
    for start in range(0, len(hessian), _OBJECTIVE_ROWS):
        rows, rest = slice(start, start + _OBJECTIVE_ROWS), slice(start + _OBJECTIVE_ROWS, None)
        product = hessian[rows, rows] @ residual[rows]
        product.addmm_(hessian[rows, rest], residual[rest], alpha=2)
        total += product.mul_(residual[rows]).sum(0).sum(dtype=torch.float64)
    return float(total)


_OBJECTIVE_ROWS = 128


def column_order(diagonal: Tensor, order: OrderName, group_size: int) -> Tensor:
    """π: the column handled at each step. `diagonal` is diag(H) [in]; int64 [in].

    gar (Group-Aware Reordering): columns by diag(H) descending inside a group, groups by their
    largest diag(H) descending, both stable; a short last group stays last.
    """
    features = len(diagonal)
    if order == "none":
        return torch.arange(features, device=diagonal.device)
    if order == "activation":
        return diagonal.argsort(descending=True, stable=True)
    whole = features // group_size * group_size
    groups = diagonal[:whole].view(-1, group_size)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    columns = inside + torch.arange(len(groups), device=diagonal.device)[:, None] * group_size
    leading = groups.amax(1).argsort(descending=True, stable=True)
    tail = diagonal[whole:].argsort(descending=True, stable=True) + whole
    return torch.cat([columns[leading].flatten(), tail])


def _choose_codes(
    weight: Tensor,  # [in, out] fp32, in the order π
    inputs: SharedInput,
    order: Tensor,  # π [in] int64
    grid: ColumnGrid,  # in the order π
    scheme: Scheme,
) -> tuple[Tensor, float, int]:
    """Codes [in, out] fp32 in the order π, the damping that it took, and the codes moved."""
    assert scheme.method != "none"
    method = METHODS[scheme.method]
    factor, damp_frac = None, scheme.damp_frac
    if method.compensate:
        factor, damp_frac = inputs.factor(order, scheme.damp_frac)
    if not method.round_inside:
        grid = replace(grid, inner=None)  # what `naive` believes in its loop
    codes = quantize_columns(weight.clone(), grid, factor, scheme.block_columns)
    if scheme.rounding == "nearest":
        return codes, damp_frac, 0
    blocks, passes = scheme.block_columns, scheme.max_passes
    hessian = inputs.hessian(order)
    return codes, damp_frac, refine_codes(codes, weight, grid, hessian, blocks, passes)


def _input_scale(magnitudes: Tensor, scheme: Scheme) -> Tensor | None:
    return static_scale_of(magnitudes, scheme) if scheme.activations == "static" else None


def static_scale_of(magnitudes: Tensor, scheme: Scheme) -> Tensor:
    """sx, the static activation scale that a scheme takes from the inputs' magnitudes [2**15]. FP32
    scalar."""
    assert scheme.inner_format is not None
    scale = static_input_scale(magnitudes, scheme.inner_format, scheme.activation_range)
    return power_of_two_above(scale) if scheme.power_of_two else scale
