"""What `why.py` does to a model of the Llama kind: statistics, quantization, scores.

Everything is on one device, the whole model with it. Weights are replaced in place by what their
codes stand for, and put back by `restored`; statistics, grids and codes are `dpq_core`'s.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from methods_score import logits
from torch import Tensor, nn
from torch.nn import functional
from why_tokens import fisher_statistics, weighted

from dpq_core.arithmetic.formats import quantize
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.objective import objective
from dpq_core.layer.quantize import quantize_layer
from dpq_core.layer.records import QuantizedLinear
from dpq_core.recipe.scheme import Scheme

# Linears of a block that read the same input, in the order in which they run.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LINEARS = tuple(name for group in GROUPS for name in group)
_VOCABULARY_ROWS = 1024  # tokens whose logits exist at a time

Statistics = dict[str, InputStatistics]  # of each linear's full name; those of a group are one


@dataclass(frozen=True)
class Variant:
    """One row: a scheme, and where its Hessians come from.

    propagation: `original`; `block`, each block fed by the quantized ones before it; `group`, each
        group of linears fed by all that is quantized before it.
    weighting: of tokens in H, see `why_tokens`.
    text: whose calibration windows. share: of them. only: a regular expression of full names.
    """

    scheme: Scheme
    propagation: str = "original"
    weighting: str = "none"
    text: str = "c4"
    share: float = 1
    only: str = ""

    def takes(self, name: str) -> bool:
        return re.search(self.only, name) is not None


@dataclass
class Quantized:
    """What became of a model: each layer's relative output error on its own calibration tokens, on
    held-out ones, and on these with equal norms."""

    errors: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def linears_of(model: Any) -> dict[str, nn.Linear]:
    return {
        f"model.layers.{index}.{name}": block.get_submodule(name)
        for index, block in enumerate(model.model.layers)
        for name in LINEARS
    }


@contextmanager
def restored(model: Any) -> Iterator[None]:
    """The model's linears are what they were when this ends."""
    linears = linears_of(model)
    before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    try:
        yield
    finally:
        for name, linear in linears.items():
            linear.weight.data.copy_(before[name])
            linear._forward_pre_hooks.clear()


class Walk:
    """Calibration windows on their way through a model, block after block."""

    def __init__(self, model: Any, windows: Tensor, batch: int) -> None:
        self.model, self.arguments = model, {}
        self.hidden: list[Tensor] = []
        self.lengths: list[dict[str, Any]] = []

        def caught(_: nn.Module, inputs: tuple[Tensor, ...], rest: dict[str, Any]) -> None:
            self.hidden.append(inputs[0])
            self.lengths.append(rest)
            raise _CaughtError

        handle = model.model.layers[0].register_forward_pre_hook(caught, with_kwargs=True)
        for part in windows.split(batch):
            try:
                model(input_ids=part.to(model.device), use_cache=False)
            except _CaughtError:
                continue
        handle.remove()

    def through(self, index: int) -> Iterator[tuple[int, Tensor]]:
        """Outputs of a block, batch after batch."""
        block = self.model.model.layers[index]
        for number, hidden in enumerate(self.hidden):
            output = block(hidden, **self.lengths[number])
            yield number, output[0] if isinstance(output, tuple) else output

    def observe(
        self, index: int, groups: Sequence[Sequence[str]], variant: Variant, magnitudes: bool
    ) -> Statistics:
        """Statistics of what these groups read in a block as it is now; nothing advances."""
        block = self.model.model.layers[index]
        found: dict[str, InputStatistics] = {}
        handles = []
        for group in groups:
            linear = block.get_submodule(group[0])
            own = InputStatistics.empty(linear.in_features, self.model.device)
            found |= {f"model.layers.{index}.{name}": own for name in group}
            hook = _counting(own, variant.weighting, magnitudes)
            handles.append(linear.register_forward_pre_hook(hook))
        for _ in self.through(index):
            pass
        for handle in handles:
            handle.remove()
        return found

    def advance(self, index: int) -> None:
        for number, output in self.through(index):
            self.hidden[number] = output


class _CaughtError(Exception):
    pass


def _counting(own: InputStatistics, weighting: str, magnitudes: bool) -> Callable[..., None]:
    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if magnitudes:
            own.add_magnitudes(inputs[0])
        own.add_hessian(weighted(inputs[0], weighting))

    return count


@torch.inference_mode()
def original_statistics(
    model: Any, windows: Tensor, variant: Variant, batch: int, magnitudes: bool = False
) -> Statistics:
    """Of all linears, from the model as it is."""
    if variant.weighting == "fisher":
        return fisher_statistics(model, windows, batch, GROUPS)
    walk, found = Walk(model, windows, batch), {}
    for index in range(len(model.model.layers)):
        found |= walk.observe(index, GROUPS, variant, magnitudes)
        walk.advance(index)
    return found


@torch.inference_mode()
def quantize_model(
    model: Any,
    variant: Variant,
    windows: Tensor,
    original: Statistics | None,
    held_out: tuple[Statistics, Statistics],
    batch: int,
) -> Quantized:
    """Quantize in place. `original` has the statistics where nothing quantized is propagated;
    `held_out` those of other tokens, as they are and with equal norms."""
    result, linears = Quantized(), linears_of(model)
    static = variant.scheme.activations == "static"

    def replace(statistics: Statistics) -> None:
        for name, own in statistics.items():
            if variant.takes(name):
                weight = linears[name].weight
                layer = quantize_layer(weight, own, variant.scheme)
                plain, even = (relative_error(weight, layer, own[name]) for own in held_out)
                result.errors[name] = layer.report.error, plain, even
                linears[name].weight.data.copy_(layer.decoded())
                _round_inputs(linears[name], layer)

    if original is not None:
        replace(original)
        return result
    walk = Walk(model, windows, batch)
    for index in range(len(model.model.layers)):
        for groups in [GROUPS] if variant.propagation == "block" else [[each] for each in GROUPS]:
            replace(walk.observe(index, groups, variant, static))
        walk.advance(index)
    return result


def relative_error(weight: Tensor, layer: QuantizedLinear, statistics: InputStatistics) -> float:
    """tr(D H Dᵀ) / tr(W H Wᵀ) with the Hessian of other tokens."""
    hessian, weight = statistics.hessian(), weight.detach().float()
    residual = (layer.decoded() - weight).T.contiguous()
    return objective(residual, hessian) / objective(weight.T.contiguous(), hessian)


def _round_inputs(linear: nn.Linear, layer: QuantizedLinear) -> None:
    """8-bit activations: what the linear reads is rounded first."""
    inner, static = layer.scheme.inner_format, layer.input_scale
    if layer.scheme.activations == "none" or inner is None:
        return

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        x = inputs[0]
        amax = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
        scale = amax / inner.maximum if static is None else static
        return (quantize(x, scale, inner) * scale).to(x.dtype)

    linear.register_forward_pre_hook(hook)


@torch.inference_mode()
def hidden_states(model: Any, windows: Tensor, batch: int) -> Tensor:
    """Last hidden states [windows, length, width], after the norm."""
    parts = [
        model.model(input_ids=part.to(model.device), use_cache=False).last_hidden_state
        for part in windows.split(batch)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Score:
    """Of windows: nats a token of each, and mean divergence from the 16-bit model in nats."""

    nats: list[float]
    divergence: float

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.nats, dtype=torch.float64).mean().exp())


@torch.inference_mode()
def score(
    model: Any,
    windows: Tensor,  # [windows, length] int64
    reference: Tensor | None,  # [windows, length, width]: hidden states of the 16-bit model
    first: int,  # of the tokens that are predicted: two where BOS leads
    batch: int,
) -> Score:
    """Perplexity and KL(p16 || p) a token, logits in FP32."""
    head, nats, divergence = model.lm_head.weight, [], 0.0
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch].to(model.device)
        states = model.model(input_ids=rows, use_cache=False).last_hidden_state
        for number, (state, row) in enumerate(zip(states, rows, strict=True)):
            state, target = state[first - 1 : -1], row[first:]
            old = None if reference is None else reference[start + number, first - 1 : -1]
            total = 0.0
            for at in range(0, len(target), _VOCABULARY_ROWS):
                part = slice(at, at + _VOCABULARY_ROWS)
                logp = functional.log_softmax(logits(state[part], head), -1)
                total -= float(logp.gather(1, target[part, None]).double().sum())
                if old is not None:
                    logq = functional.log_softmax(logits(old[part], head), -1)
                    divergence += float((logq.exp() * (logq - logp)).sum(1).double().sum())
            nats.append(total / len(target))
    return Score(nats, divergence / len(windows) / (windows.shape[1] - first))
