"""What `methods_table.py` does to a model on one device: statistics, and one row quantized.

A model of the Llama kind by its modules' names (Llama, Gemma 3, …), whole on the device, in 16
bits. Its linears are replaced by `W4A8Linear`, the product's own definition of what is served, and
put back by `Subject.restored`. Statistics, grids, codes and errors are `dpq_core`'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from methods_rows import Row
from prototypes import output_range, refit, restored, target_weight
from torch import Tensor, nn
from why_tokens import weighted

from dpq_core.calibration.statistics import InputRounding
from dpq_core.kernels.dispatch import count_magnitudes
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import quantize_or_keep
from dpq_core.layer.records import QuantizedLinear
from dpq_core.layer.shared_input import SharedInput
from dpq_core.layer.storage import stored_bytes

# Linears of a block that read the same input, in the order in which they run.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
FIRSTS = tuple(group[0] for group in GROUPS)
# What stands in the residual stream where a linear that writes to it began.
BEFORE = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}

Statistics = dict[str, InputStatistics]  # by the full name of a group's first linear
Seen = dict[str, list[Tensor]]  # what modules of a block read, batch after batch


def full_name(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}"


class Subject:
    """A model whose linears come and go."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.blocks = len(model.model.layers)
        if model.lm_head.weight is model.get_input_embeddings().weight:
            # A rotation turns them differently.
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
        self.linears = {
            full_name(index, name): block.get_submodule(name)
            for index, block in enumerate(model.model.layers)
            for group in GROUPS
            for name in group
        }

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def weights(self, index: int, group: Sequence[str]) -> dict[str, Tensor]:
        """16-bit weights of linears of a block, by full name."""
        names = [full_name(index, name) for name in group]
        return {name: self.linears[name].weight for name in names}

    def put(self, layers: Mapping[str, QuantizedLinear]) -> None:
        for name, layer in layers.items():
            module = W4A8Linear(layer.to(self.device), self.linears[name].bias)
            self.model.set_submodule(name, module)

    def take_back(self, index: int | None = None) -> None:
        """16-bit linears again, of one block or of all."""
        for name, linear in self.linears.items():
            if index is None or name.startswith(full_name(index, "")):
                self.model.set_submodule(name, linear)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Linears are what they were when this ends."""
        try:
            yield
        finally:
            self.take_back()


class Walk:
    """Calibration windows on their way through a model, block after block."""

    def __init__(self, subject: Subject, windows: Tensor, batch: int) -> None:
        self.subject = subject
        self.hidden: list[Tensor] = []
        self.keywords: list[list[dict[str, Any]]] = []  # of every block, by batch
        layers = subject.model.model.layers

        def caught(block: nn.Module, inputs: tuple[Tensor, ...], rest: dict[str, Any]) -> None:
            if block is layers[0]:
                self.hidden.append(inputs[0])
                self.keywords.append([])
            self.keywords[-1].append(rest)

        hooks = [layer.register_forward_pre_hook(caught, with_kwargs=True) for layer in layers]
        for part in windows.split(batch):
            subject.model.model(input_ids=part.to(subject.device), use_cache=False)
        for hook in hooks:
            hook.remove()

    def twin(self) -> "Walk":
        """The same windows at the same place, to go another way."""
        other = object.__new__(Walk)
        other.subject, other.keywords, other.hidden = self.subject, self.keywords, [*self.hidden]
        return other

    def through(self, index: int, watched: Sequence[str] = (), advance: bool = False) -> Seen:
        """Run a block as it is now: what its modules `watched` read, [windows, length, in] each."""
        block, seen = self.subject.model.model.layers[index], {name: [] for name in watched}
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name: seen[name].append(inputs[0])
            )
            for name in watched
        ]
        for number, hidden in enumerate(self.hidden):
            output = block(hidden, **self.keywords[number][index])
            if advance:
                self.hidden[number] = output[0] if isinstance(output, tuple) else output
        for hook in hooks:
            hook.remove()
        return seen


def rounding_of(row: Row) -> InputRounding | None:
    """How inputs are rounded before they are counted, as the product does."""
    scheme = row.scheme
    if scheme.activations == "none" or scheme.inner_format is None:
        return None
    return InputRounding(scheme.inner_format, scheme.activations == "static", scheme)


def counted(
    row: Row, inputs: Sequence[Tensor], magnitudes: Tensor | None = None
) -> InputStatistics:
    """Statistics of a linear's inputs, [windows, length, in] each. magnitudes: of other inputs,
    which static scales come from."""
    found = InputStatistics.empty(inputs[0].shape[-1], inputs[0].device)
    if magnitudes is None:
        magnitudes = sum((count_magnitudes(x) for x in inputs), start=found.magnitudes)
    found.magnitudes = magnitudes
    rounding = rounding_of(row)
    scale = rounding.static_scale(magnitudes) if rounding else None
    scale = scale if scale is None else scale.to(inputs[0].device)
    for x in inputs:
        x8, unit = rounding.rounded(x, scale) if rounding else (x, None)
        equal = row.weighting.startswith("unit")
        x8 = weighted(x8.view(x.shape), row.weighting)
        found.add_hessian(x8, None if equal else unit)
    return found


@torch.inference_mode()
def original_statistics(
    subject: Subject,
    row: Row,
    windows: Tensor,
    batch: int,
    scales: Mapping[str, Tensor] | None = None,
) -> Statistics:
    """Of all groups, from the model as it is."""
    walk, found = Walk(subject, windows, batch), {}
    for index in range(subject.blocks):
        seen = walk.through(index, FIRSTS, advance=True)
        for first, inputs in seen.items():
            name = full_name(index, first)
            found[name] = counted(row, inputs, scales[name] if scales else None)
    return found


@dataclass
class Quantized:
    """What became of a model: error of each layer on the tokens of its Hessian and on others, with
    plain and with equal norms; bits a weight."""

    layers: dict[str, QuantizedLinear] = field(default_factory=dict)
    errors: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        if not self.layers:
            return 16.0
        shapes = {name: _shape(layer) for name, layer in self.layers.items()}
        stored = sum(stored_bytes(*shapes[name], each.scheme) for name, each in self.layers.items())
        return 8 * stored / sum(rows * features for rows, features in shapes.values())

    def mean_errors(self) -> list[float]:
        return [sum(column) / len(column) for column in zip(*self.errors.values(), strict=True)]


def _shape(layer: QuantizedLinear) -> tuple[int, int]:
    shape = layer.decoded().shape
    return shape[0], shape[1]


@torch.inference_mode()
def quantize_model(
    subject: Subject,
    row: Row,
    windows: Tensor,
    batch: int,
    original: Statistics | None,
    held_out: Sequence[Statistics],
) -> Quantized:
    """Quantize the model in place. `original` has the statistics where nothing quantized is
    propagated; `held_out` are those of other tokens."""
    made = Quantized()

    def finish(index: int, group: Sequence[str], layers: dict[str, QuantizedLinear]) -> None:
        first = full_name(index, group[0])
        for name, weight in subject.weights(index, group).items():
            errors = [relative_error(weight, layers[name], own[first]) for own in held_out]
            made.errors[name] = layers[name].report.error, *errors
        made.layers |= layers
        subject.put(layers)

    if original is not None:
        for index in range(subject.blocks):
            for group in GROUPS:
                statistics = original[full_name(index, group[0])]
                finish(index, group, _layers(row, subject.weights(index, group), statistics))
        return made
    sixteen = Walk(subject, windows, batch)
    walk = sixteen.twin()
    for index in range(subject.blocks):
        watched = [*FIRSTS, *(BEFORE.values() if row.stream else ())]
        targets = sixteen.through(index, watched, advance=True)
        if row.propagation == "original":
            walk.hidden = []
        seen = walk.through(index, FIRSTS) if row.propagation == "block" else targets
        for group in GROUPS:
            first = group[0]
            before = [BEFORE[first]] if row.stream and first in BEFORE else []
            if row.propagation == "group":
                seen = walk.through(index, [first, *before])
            inputs = seen[first]
            statistics = counted(row, inputs)
            goals = _goals(row, subject.weights(index, group), statistics, inputs, targets[first])
            if before:
                lost = [a - b for a, b in zip(targets[before[0]], seen[before[0]], strict=True)]
                _add_lost(row, goals, statistics, inputs, lost)
            finish(index, group, _layers(row, goals, statistics, inputs))
        if row.propagation != "original":
            walk.through(index, advance=True)
    return made


def _layers(
    row: Row, weights: dict[str, Tensor], statistics: InputStatistics, inputs: Sequence[Tensor] = ()
) -> dict[str, QuantizedLinear]:
    """The layers of a group by name, of 16-bit weights or of what stands for them."""
    shared, layers = SharedInput(replace(statistics)), {}
    own_scale = None
    if row.output_range:
        sample = torch.cat([x.flatten(0, 1) for x in inputs])
        inner = row.scheme.inner_format
        own_scale = output_range(sample, [w.float() for w in weights.values()], statistics, inner)
    for name, weight in weights.items():
        layer = quantize_or_keep(weight, shared, row.scheme, 0)
        if own_scale is not None:
            layer = replace(layer, input_scale=own_scale)
        for _ in range(row.refit):
            layer = refit(weight.float(), statistics.hessian(), layer)
        layers[name] = layer
    return layers


def _arithmetic(row: Row, statistics: InputStatistics, x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs x [windows, length, in] as the 8-bit arithmetic sees them, [tokens, in] fp32, and the
    roots of the tokens' weights in H [tokens, 1]."""
    rounding, x8 = rounding_of(row), x.float()
    if rounding:
        scale = rounding.static_scale(statistics.magnitudes)
        values, unit = rounding.rounded(x, None if scale is None else scale.to(x.device))
        x8 = values.view(x.shape).float() * (1 if unit is None else unit)
    lengths = x8.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    roots = weighted(x8, row.weighting).norm(dim=-1, keepdim=True) / lengths
    return x8.flatten(0, 1), roots.flatten(0, 1)


def _goals(
    row: Row,
    weights: dict[str, Tensor],
    statistics: InputStatistics,
    inputs: Sequence[Tensor],
    originals: Sequence[Tensor],
) -> dict[str, Tensor]:
    """What is quantized: the weights, or what comes nearest to the 16-bit model's outputs."""
    if not row.target:
        return dict(weights)
    shift = torch.zeros_like(statistics.hessian_sum)
    for x, x16 in zip(inputs, originals, strict=True):
        x8, roots = _arithmetic(row, statistics, x)
        away = (x16.flatten(0, 1).float() - x8) * roots
        shift += 2 * away.T @ (x8 * roots)
    shift /= statistics.tokens
    hessian, goals = statistics.hessian(), {}
    for name, weight in weights.items():
        moved = target_weight(weight.float(), hessian, shift, row.target_damp)
        goals[name] = weight + row.target * (moved - weight)
    return goals


def _add_lost(
    row: Row,
    goals: dict[str, Tensor],
    statistics: InputStatistics,
    inputs: Sequence[Tensor],
    lost: Sequence[Tensor],
) -> None:
    """What the residual stream lost before these linears, restored by them."""
    (name,) = goals
    moment = torch.zeros(len(goals[name]), len(statistics.hessian_sum), device=inputs[0].device)
    for x, gone in zip(inputs, lost, strict=True):
        x8, roots = _arithmetic(row, statistics, x)
        moment += 2 * (gone.flatten(0, 1).float() * roots).T @ (x8 * roots)
    moment /= statistics.tokens
    goals[name] = goals[name] + row.stream * restored(moment, statistics.hessian(), row.target_damp)


def relative_error(weight: Tensor, layer: QuantizedLinear, statistics: InputStatistics) -> float:
    """tr(D H Dᵀ) / tr(W H Wᵀ) with the Hessian of other tokens."""
    hessian, weight = statistics.hessian(), weight.float()
    residual = layer.decoded() - weight
    lost, whole = (
        ((each @ hessian) * each).sum(dtype=torch.float64) for each in (residual, weight)
    )
    return float(lost / whole)
