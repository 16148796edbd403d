"""Prototypes that `four_bits.py` measures: no part of the pipeline.

b  refit           group scales of least objective for fixed codes, then gradient rounding again
c  target_weight   the weight that comes nearest to the 16-bit model's output (GPTAQ, arXiv
                   2504.02692; Qronos, 2505.11695, solves for it as here)
   restored        what a layer's inputs tell of the residual stream's loss
d  scaled          channels scaled by rms(x)^α / rms(w)^β (AWQ, arXiv 2306.00978), chosen by the
                   objective of the layers that read them
e  rotated         residual stream (R1) and values (R2) rotated (QuaRot, SpinQuant)
f  output_range    the activation range of least output error
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transforms
from torch import Tensor

from dpq_core.arithmetic.formats import NumberFormat, quantize
from dpq_core.calibration.statistics import InputRounding
from dpq_core.layer.column_loop import inverse_factor
from dpq_core.layer.gradient_rounding import refine_codes
from dpq_core.layer.grid import Grid
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.input_scale import static_input_scale
from dpq_core.layer.objective import objective
from dpq_core.layer.quantize import quantize_or_keep
from dpq_core.layer.records import QuantizedLinear, QuantizedWeight
from dpq_core.layer.shared_input import SharedInput
from dpq_core.model.inputs import Batch, batches_of
from dpq_core.model.observed import observing
from dpq_core.model.reader import read_config
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import Recipe
from dpq_core.recipe.scheme import Scheme


def members_of(stream: StreamedModel, block: int) -> list[list[str]]:
    """The linears of a block by their names inside it, those that read the same input together."""
    prefix = f"{stream.block_name(block)}."
    return [[name.removeprefix(prefix) for name in group] for group in stream.groups(block)]


def inputs_of(
    stream: StreamedModel,
    block: int,
    batches: Sequence[Batch],
    done: dict[str, QuantizedLinear],
    members: list[str],
) -> dict[str, Tensor]:
    """What linears of a block read, [tokens, in] each."""
    seen: dict[str, list[Tensor]] = {member: [] for member in members}
    with stream.block(block, done) as module:
        watched = {member: module.get_submodule(member) for member in members}

        def keep(name: str, x: Tensor) -> None:
            seen[name].append(x.flatten(0, -2).clone())

        with observing(watched, keep):
            for batch in batches:
                stream.forward(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def rounded(rounding: InputRounding, x: Tensor, magnitudes: Tensor) -> Tensor:
    """Inputs [..., in] as the 8-bit arithmetic will see them, scaled by their magnitudes. FP32."""
    values, scale = rounding.rounded(x, rounding.static_scale(magnitudes))
    return values.float() if scale is None else values.float() * scale


# (b) scales refitted to fixed codes


def refit(weight: Tensor, hessian: Tensor, layer: QuantizedLinear) -> QuantizedLinear:
    """Group by group the scale of least objective for the codes, then gradient rounding."""
    assert isinstance(layer.weight, QuantizedWeight)
    grid = layer.weight.grid
    codes = layer.weight.codes.T.float().contiguous()
    grid = refit_scales(codes, weight.T.contiguous(), grid, hessian)
    columns = torch.arange(len(codes), device=codes.device)
    scheme = layer.scheme
    refine_codes(
        codes,
        weight.T.contiguous(),
        grid.at(columns),
        hessian,
        scheme.block_columns,
        scheme.max_passes,
    )
    return replace(layer, weight=QuantizedWeight(codes.T.to(torch.uint8).contiguous(), grid))


def refit_scales(codes: Tensor, weight: Tensor, grid: Grid, hessian: Tensor) -> Grid:
    """codes, weight [in, out] fp32. Objective never rises."""
    columns = torch.arange(len(codes), device=codes.device)
    residual = grid.at(columns).decode(codes) - weight
    gradient = hessian @ residual
    scales = grid.group_scale.clone()
    size = grid.group_size
    ratios = 1 + torch.arange(-12, 13, device=codes.device)[:, None] / 128
    for group in range(scales.shape[1]):
        span = slice(group * size, min((group + 1) * size, len(codes)))
        inside = hessian[span, span]
        column = grid.at(columns[span])[:]
        now = column.decode(codes[span])
        direction = column.channel_scale * (codes[span] - column.zero_point)
        # around the target of this group alone: now - step along the direction
        curvature = (direction * (inside @ direction)).sum(0)
        slope = (direction * gradient[span]).sum(0)
        old = scales[:, group]
        base = old.float() - torch.where(curvature > 0, slope / curvature, 0)
        tried = torch.cat([old[None], base * ratios, old * ratios]).to(torch.bfloat16)
        tried = torch.where(tried > 0, tried, old)[:, None]  # [tried, 1, out]
        new = replace(column, group_scale=tried.float().expand(-1, *now.shape))
        changes = new.decode(codes[span]) - now  # [tried, n, out]
        losses = (changes * (2 * gradient[span] + inside @ changes)).sum(1)
        best = losses.argmin(0)
        best[losses.amin(0) >= 0] = 0  # the old scale
        out = torch.arange(len(best), device=best.device)
        scales[:, group] = tried[best, 0, out]
        gradient += hessian[:, span] @ changes[best, :, out].T
    return replace(grid, group_scale=scales)


# (c) what the residual stream lost


def target_weight(
    weight: Tensor,  # [out, in] fp32
    hessian: Tensor,  # [in, in] fp32, of the inputs x
    shift: Tensor,  # [in, in] fp32, S = mean 2 (x16 - x) xᵀ
    damp_frac: float,
) -> Tensor:  # [out, in] fp32
    """W' = W + W S (H + λ)⁻¹, the least squares of W x16 on x, held near W by the damping."""
    factor, _ = inverse_factor(hessian, damp_frac)
    return weight + (weight @ shift @ factor.T) @ factor


def restored(moment: Tensor, hessian: Tensor, damp_frac: float) -> Tensor:
    """R (H + λ)⁻¹, R = mean 2 lost x8ᵀ [out, in]: what the inputs tell of the stream's loss."""
    factor, _ = inverse_factor(hessian, damp_frac)
    return (moment @ factor.T) @ factor


# (d) scaled channels


def scaled(
    tensors: transforms.Tensors, recipe: Recipe, windows: Tensor, sites: tuple[str, ...]
) -> transforms.Tensors:
    """Each site's channels scaled by `scale_factor`."""
    stream = StreamedModel(Path(recipe.model.id))
    heads = transforms.Heads.of(read_config(Path(recipe.model.id)))
    batches = stream.begin(batches_of(windows, recipe.calibration.batch_size))
    factors: dict[str, Tensor] = {}
    for block in range(stream.block_count):
        prefix = stream.block_name(block)
        groups = [g for g in members_of(stream, block) if g[0].split(".")[-1] in sites]
        raw = inputs_of(stream, block, batches, {}, [g[0] for g in groups])
        for group in groups:
            found = InputStatistics.empty(raw[group[0]].shape[1])
            found.add_hessian(raw[group[0]])
            weights = [tensors[f"{prefix}.{member}.weight"] for member in group]
            fold = heads if group[0].endswith("o_proj") else None
            factors[f"{prefix}.{group[0]}"] = scale_factor(weights, found.hessian(), fold)
        with stream.block(block):
            stream.advance(batches)
    return transforms.scale_channels(tensors, heads, factors)


def scale_factor(weights: list[Tensor], hessian: Tensor, heads: transforms.Heads | None) -> Tensor:
    """s = rms(x)^α / rms(w)^β of the channels that these linears [out, in] read, α and β by the
    layers' objective after quantization: the inputs x / s have H / (s sᵀ). heads: where the inputs
    are values, which several query heads share."""
    activity, size = hessian.diagonal() / 2, torch.cat(weights).square().mean(0)
    if heads:
        activity, size = unspread(activity, heads), unspread(size, heads)
    activity, size = activity.clamp(min=1e-12).sqrt(), size.clamp(min=1e-12).sqrt()
    best, least = torch.ones_like(activity), torch.inf
    for alpha, beta in SHARES:
        factor = activity**alpha / size**beta
        factor = factor / factor.log().mean().exp()
        columns = transforms.spread_values(factor, heads) if heads else factor
        inverse = 1 / columns
        found = InputStatistics.empty(len(hessian), hessian.device)
        found.hessian_sum, found.tokens = hessian * inverse[:, None] * inverse, 1
        shared = SharedInput(found)
        total = 0.0
        for weight in weights:
            layer = quantize_or_keep(weight * columns, shared, _SEARCHED, 0)
            residual = (layer.decoded() * inverse - weight).T.contiguous()
            total += objective(residual, hessian)
        if total < least:
            best, least = factor, total
    return best


SHARES = [(alpha, beta) for alpha in (0.0, 0.25, 0.5) for beta in (0.0, 0.25, 0.5)]
_SEARCHED = Scheme(rounding="nearest", activations="dynamic")


def unspread(square: Tensor, heads: transforms.Heads) -> Tensor:
    grouped = square.view(heads.values, heads.queries // heads.values, heads.features)
    return grouped.mean(1).flatten()


# (e) rotations


def rotated(
    tensors: transforms.Tensors, heads: transforms.Heads, seed: int, stream: bool, values: bool
) -> transforms.Tensors:
    device = tensors[transforms.EMBEDDING].device
    generator = torch.Generator().manual_seed(seed)
    if stream:
        width = tensors[transforms.EMBEDDING].shape[1]
        rotation = transforms.random_rotation(width, generator).to(device)
        tensors = transforms.rotate_stream(tensors, heads, rotation)
    if values:
        count = heads.blocks * heads.values
        each = [transforms.random_rotation(heads.features, generator) for _ in range(count)]
        rotations = torch.stack(each).unflatten(0, (heads.blocks, heads.values)).to(device)
        tensors = transforms.rotate_values(tensors, heads, rotations)
    return tensors


# (f) activation ranges by output error


def output_range(
    x: Tensor, weights: list[Tensor], found: InputStatistics, inner: NumberFormat
) -> Tensor:
    """sx of least ‖W (x − x8)‖² over the layers that read x, among shrunk ranges."""
    top = static_input_scale(found.magnitudes, inner, "amax").to(x.device)
    joined = torch.cat(weights)
    metric = joined.T @ joined
    x = x[:: max(1, len(x) // 8192)].float()
    best, least = top, torch.inf
    for step in range(33):
        scale = top * 2 ** (-step / 8)
        residual = quantize(x, scale, inner) * scale - x
        error = float(((residual @ metric) * residual).sum())
        if error < least:
            best, least = scale, error
    return best
