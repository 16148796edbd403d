"""Quantize one linear layer: the whole of DPQ and of what it is compared with.

`quantize_layer` takes a weight, the statistics of its inputs and a scheme. It walks no model and
touches no file. Layers that read one input share what comes of it (`dpq_core.layer.shared_input`).

Steps as in DESIGN: grid from the weight (corrected for what was quantized before it, where the
recipe says so: `dpq_core.layer.correction`), column loop in the order π, gradient-aware rounding,
order undone. Group scales belong to the stored column order (static groups), so that every order is
free at inference.
"""

from collections.abc import Sequence
from dataclasses import astuple, replace

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
from dpq_core.layer.unseen import UnseenErrors, unseen_errors
from dpq_core.recipe.calibration import WhereRoundingWins
from dpq_core.recipe.layer_choices import chosen_scheme
from dpq_core.recipe.scheme import METHODS, Scheme


def quantize_or_keep(
    weight: Tensor | GivenWeight,  # [out, in], any float type, or given codes for method keep
    inputs: SharedInput | None,
    scheme: Scheme,
    min_tokens_per_input: float,
    correction: float = 0.0,
    where_rounding_wins: WhereRoundingWins = "name",
) -> QuantizedLinear:
    """Quantize a layer, or keep it in 16 bits where its scheme says so: FP16 as it is, all else in
    BF16. One (a rarely chosen expert) that saw no calibration token, or fewer than
    `min_tokens_per_input` for each of its inputs, is kept too; its report says so.

    A Hessian of fewer tokens than inputs is singular: compensation fits these tokens, and on others
    does worse than no compensation (`docs/log.md`). Codes that are given need one token alone.

    Args:
        inputs: None for an embedding, whose columns all count alike.
        correction: the share of it that is taken, see `dpq_core.layer.correction`.
        where_rounding_wins: what becomes of codes that do worse than the nearest ones on unseen
            tokens (`dpq_core.layer.unseen`): the report has it, the nearest are taken, or it is an
            error.

    Raises:
        ValueError, FactorizationError: as `quantize_layer`; with `refuse` codes that do worse.
    """
    if inputs is None:
        assert isinstance(weight, Tensor)
        even = SharedInput(InputStatistics.even(weight.shape[1], weight.device))
        return _by_pieces(weight, even, scheme, 0.0, "name")
    tokens, features, kept = inputs.tokens, inputs.features, ""
    if tokens == 0 or (not scheme.keeps and tokens < min_tokens_per_input * features):
        kept = (
            f"saw {tokens} calibration tokens for {features} inputs, and "
            f"calibration.min_tokens_per_input is {min_tokens_per_input:g}"
        )
        scheme = chosen_scheme(scheme, "bf16")
    layer = _by_pieces(weight, inputs, scheme, correction, where_rounding_wins)
    return replace(layer, report=replace(layer.report, tokens=tokens, kept=kept))


def _by_pieces(
    weight: Tensor | GivenWeight,
    inputs: SharedInput,
    scheme: Scheme,
    correction: float,
    where_rounding_wins: WhereRoundingWins,
) -> QuantizedLinear:
    """A layer, or the rows of a large one piece by piece: they do not know of one another."""
    passed = inputs, scheme, correction, where_rounding_wins
    if isinstance(weight, GivenWeight):
        return _quantized(weight, *passed)
    every = rows_at_once(len(weight), scheme)
    if every == len(weight):
        return _quantized(weight, *passed)
    pieces = weight.split(every)
    parts = [_quantized(piece, *passed) for piece in pieces]
    reports = [part.report for part in parts]
    whole = [objective(piece.float().T, inputs.hessian()) for piece in pieces]
    report = LayerReport(
        error=_mean([each.error for each in reports], whole),
        damp_frac=max(each.damp_frac for each in reports),
        codes_moved=sum(each.codes_moved for each in reports),
        corrected=_mean([each.corrected for each in reports], whole),
        unseen=_mean_unseen([each.unseen for each in reports], whole),
        rounded=any(each.rounded for each in reports),
    )
    return joined(parts, report)


def _mean(errors: Sequence[float], whole: Sequence[float]) -> float:
    """The relative error of parts together, each a share of its own `whole`."""
    return relative(sum(e * own for e, own in zip(errors, whole, strict=True)), sum(whole))


def _mean_unseen(
    errors: Sequence[UnseenErrors | None], whole: Sequence[float]
) -> UnseenErrors | None:
    """Parts' outputs are as large for unseen tokens as for those of H, which are like them."""
    there = [each for each in errors if each is not None]
    if len(there) < len(errors):
        return None
    return UnseenErrors(*(_mean(each, whole) for each in zip(*map(astuple, there), strict=True)))


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
    return _quantized(weight, SharedInput(statistics), scheme, correction, "name")


def _quantized(
    weight: Tensor | GivenWeight,
    inputs: SharedInput,
    scheme: Scheme,
    correction: float,
    where_rounding_wins: WhereRoundingWins,
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
    at = grid.at(order)
    codes, damp_frac, moved = _choose_codes(weight, inputs, order, at, scheme)
    unseen, nearest = _on_unseen(codes, weight, at, inputs, order, scheme, where_rounding_wins)
    if nearest is not None:
        codes, moved = nearest, 0
    lost = objective(residual(codes, weight, at), hessian)  # uses the weight up
    stored = codes.to(torch.uint8).index_select(0, order.argsort()).T.contiguous()
    report = LayerReport(
        error=relative(lost, whole),
        damp_frac=max(damp_frac, damped),
        codes_moved=moved,
        corrected=corrected,
        unseen=unseen,
        rounded=nearest is not None,
    )
    return QuantizedLinear(scheme, QuantizedWeight(stored, grid), input_scale, report)


def _on_unseen(
    codes: Tensor,  # [in, out] fp32, in the order π
    weight: Tensor,  # [in, out] fp32, in the order π
    grid: ColumnGrid,  # in the order π
    inputs: SharedInput,
    order: Tensor,  # π [in] int64
    scheme: Scheme,
    where_rounding_wins: WhereRoundingWins,
) -> tuple[UnseenErrors | None, Tensor | None]:
    """Errors on unseen tokens, where there are such and codes are chosen; and the nearest codes
    where these are to be taken."""
    chosen = METHODS[scheme.method].compensate or scheme.rounding == "gradient"
    if not chosen or inputs.unseen is None or not len(inputs.unseen):
        return None, None
    tokens = inputs.unseen.index_select(1, order)
    errors, nearest = unseen_errors(codes, weight, grid, tokens, scheme.block_columns)
    if errors.rounding_wins and where_rounding_wins == "refuse":
        raise ValueError(
            f"{errors}: give more calibration.samples, or text that is like what will be read; or"
            " set calibration.where_rounding_wins: round"
        )
    return errors, nearest if errors.rounding_wins and where_rounding_wins == "round" else None


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
