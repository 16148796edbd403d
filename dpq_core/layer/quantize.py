"""Quantize one linear layer: the whole of DPQ and of what it is compared with.

`quantize_layer` takes a weight, the statistics of its inputs and a scheme. It walks no model and
touches no file. Layers that read one input share what comes of it (`dpq_core.layer.shared_input`).

Steps as in DESIGN: grid from the weight (corrected for what was quantized before it, where the
recipe says so: `dpq_core.layer.correction`), column loop in the order π, gradient-aware rounding,
order undone. Group scales belong to the stored column order (static groups), so that every order is
free at inference.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.arithmetic.formats import round_to
from dpq_core.kernels.dispatch import residual
from dpq_core.layer.column_loop import quantize_columns
from dpq_core.layer.column_order import column_order
from dpq_core.layer.given import GivenWeight, given_grid
from dpq_core.layer.gradient_rounding import refine_codes
from dpq_core.layer.grid import choose_channel_scale, choose_grid
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.input_scale import static_scale_of
from dpq_core.layer.objective import objective, relative
from dpq_core.layer.records import (
    LayerReport,
    QuantizedLinear,
    QuantizedWeight,
    RoundedWeight,
    joined,
)
from dpq_core.layer.shared_input import SharedInput
from dpq_core.recipe.layer_choices import chosen_scheme
from dpq_core.recipe.scheme import METHODS, Scheme


def quantize_or_keep(
    weight: Tensor | GivenWeight,  # [out, in], any float type, or given codes for method keep
    inputs: SharedInput | None,
    scheme: Scheme,
    min_tokens_per_input: float,
    correction: float = 0.0,
) -> QuantizedLinear:
    """Quantize a layer, or keep it in 16 bits where its scheme says so: FP16 as it is, all else in
    BF16. One (a rarely chosen expert) that saw no calibration token, or fewer than
    `min_tokens_per_input` for each of its inputs, is kept too; its report says so.

    A Hessian of fewer tokens than inputs is singular: compensation fits these tokens, and on others
    does worse than no compensation (`docs/log.md`). Codes that are given need one token alone.

    Args:
        inputs: None for an embedding, whose columns all count alike.
        correction: the share of it that is taken, see `dpq_core.layer.correction`.

    Raises:
        ValueError, FactorizationError: as `quantize_layer`.
    """
    if inputs is None:
        assert isinstance(weight, Tensor)
        even = SharedInput(InputStatistics.even(weight.shape[1], weight.device))
        return _by_pieces(weight, even, scheme, 0.0)
    tokens, features, kept = inputs.tokens, inputs.features, ""
    if tokens == 0 or (not scheme.keeps and tokens < min_tokens_per_input * features):
        kept = (
            f"saw {tokens} calibration tokens for {features} inputs, and "
            f"calibration.min_tokens_per_input is {min_tokens_per_input:g}"
        )
        scheme = chosen_scheme(scheme, "bf16")
    layer = _by_pieces(weight, inputs, scheme, correction)
    return replace(layer, report=replace(layer.report, tokens=tokens, kept=kept))


def _by_pieces(
    weight: Tensor | GivenWeight, inputs: SharedInput, scheme: Scheme, correction: float
) -> QuantizedLinear:
    """A layer, or the rows of a large one piece by piece: they do not know of one another."""
    if isinstance(weight, GivenWeight):
        return _quantized(weight, inputs, scheme, correction)
    every = rows_at_once(len(weight), scheme)
    if every == len(weight):
        return _quantized(weight, inputs, scheme, correction)
    pieces = weight.split(every)
    parts = [_quantized(piece, inputs, scheme, correction) for piece in pieces]
    whole = [objective(piece.float().T, inputs.hessian()) for piece in pieces]
    lost = sum(part.report.error * own for part, own in zip(parts, whole, strict=True))
    moved = sum(part.report.corrected * own for part, own in zip(parts, whole, strict=True))
    report = LayerReport(
        error=relative(lost, sum(whole)),
        damp_frac=max(part.report.damp_frac for part in parts),
        codes_moved=sum(part.report.codes_moved for part in parts),
        corrected=relative(moved, sum(whole)),
    )
    return joined(parts, report)


def rows_at_once(rows: int, scheme: Scheme) -> int:
    """Of a layer of so many rows, those that are quantized together: all, but of an output head
    or an embedding of many tokens, where no scale is of all of them."""
    alone = scheme.channel_scale == "row" or scheme.inner_format is None
    return _PIECE if rows > _MANY and alone and scheme.method != "none" else rows


_MANY, _PIECE = 1 << 16, 1 << 14  # rows


def quantize_layer(
    weight: Tensor | GivenWeight,  # [out, in], any float type, or given codes for method keep
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
    weight: Tensor | GivenWeight, inputs: SharedInput, scheme: Scheme, correction: float
) -> QuantizedLinear:
    if isinstance(weight, GivenWeight):
        if scheme.keeps:
            return _kept(weight, inputs, scheme)
        weight = weight.in_16_bits()
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
        whole = objective(weight.T, hessian)
        error = relative(objective(rounded.decode().sub_(weight).T, hessian), whole)
        corrected = 0.0 if change is None else relative(objective(change.T, hessian), whole)
        report = LayerReport(error, damped, 0, corrected=corrected)
        return QuantizedLinear(scheme, rounded, input_scale, report)
    diagonal = inputs.diagonal()
    grid = choose_grid(weight, scheme, diagonal)
    order = column_order(diagonal, scheme.order, scheme.group_size)
    weight = weight.index_select(1, order).T.contiguous()
    hessian = inputs.hessian(order)
    whole, corrected = objective(weight, hessian), 0.0
    if change is not None:
        corrected = relative(objective(change.index_select(1, order).T, hessian), whole)
        del change
    codes, damp_frac, moved = _choose_codes(weight, inputs, order, grid.at(order), scheme)
    lost = objective(residual(codes, weight, grid.at(order)), hessian)  # uses the weight up
    stored = codes.to(torch.uint8).index_select(0, order.argsort()).T.contiguous()
    report = LayerReport(relative(lost, whole), max(damp_frac, damped), moved, corrected=corrected)
    return QuantizedLinear(scheme, QuantizedWeight(stored, grid), input_scale, report)


def _kept(given: GivenWeight, inputs: SharedInput, scheme: Scheme) -> QuantizedLinear:
    """The given codes under a grid of the scheme's."""
    weight, hessian = given.decode(), inputs.hessian()
    if not torch.isfinite(given.scale).all():
        raise ValueError("a given scale is NaN or infinite")
    grid = given_grid(given, scheme, inputs.diagonal())
    whole, size = objective(weight.T, hessian), float(weight.square().sum())
    lost = grid.decode(given.codes).sub_(weight)
    report = LayerReport(
        error=relative(objective(lost.T, hessian), whole),
        damp_frac=scheme.damp_frac,
        codes_moved=0,
        given_error=relative(float(lost.square_().sum()), size),
    )
    input_scale = _input_scale(inputs.magnitudes, scheme)
    return QuantizedLinear(scheme, QuantizedWeight(given.codes, grid), input_scale, report)


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
