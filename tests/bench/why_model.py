"""What `why.py` does to a model of the Llama kind: statistics, quantization, scores, training.

Everything is on one device, the whole model with it. Weights are replaced in place by what their
codes stand for, and put back by `restored`; statistics, grids and codes are `dpq_core`'s.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpq_core import cpu
from dpq_core.formats import fake_quantize
from dpq_core.hessian import InputStatistics
from dpq_core.quantize import QuantizedLinear, objective, quantize_layer
from dpq_core.scheme import Scheme

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
    weighting: of tokens in H: `none`; `drop`, without each window's first eight; `cap`, norms
        capped at twice the median; `unit`, all norms equal.
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
    """What became of a model: relative output errors of each layer, and its activations' scales."""

    errors: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    layers: dict[str, QuantizedLinear] = field(default_factory=dict)


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


def weighted(x: Tensor, weighting: str) -> Tensor:
    """Inputs [windows, length, in] times the square roots of their tokens' weights in H."""
    if weighting == "none":
        return x
    if weighting == "drop":
        return x[:, 8:]
    norms = x.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    if weighting == "unit":
        return x / norms
    limit = 2 * norms.median()
    return x * (limit / norms).clamp(max=1)


@torch.inference_mode()
def original_statistics(
    model: Any, windows: Tensor, variant: Variant, batch: int, magnitudes: bool = False
) -> Statistics:
    """Of all linears, from the model as it is."""
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
    held_out: Statistics,
    batch: int,
) -> Quantized:
    """Quantize in place. `original` has the statistics where nothing quantized is propagated."""
    result, linears = Quantized(), linears_of(model)
    static = variant.scheme.activations == "static"

    def replace(statistics: Statistics) -> None:
        for name, own in statistics.items():
            if variant.takes(name):
                layer = quantize_layer(linears[name].weight, own, variant.scheme)
                result.errors[name] = layer.report.error
                result.held_out[name] = relative_error(linears[name].weight, layer, held_out[name])
                linears[name].weight.data.copy_(layer.decoded())
                result.layers[name] = layer
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
        return fake_quantize(x, scale, inner).to(x.dtype)

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


def logits(states: Tensor, head: Tensor) -> Tensor:
    """states [n, width], head [vocabulary, width] → [n, vocabulary] fp32, sums in FP32."""
    if not cpu.multiplies_bf16(states):
        return states.float() @ head.float().T
    states, found = states.contiguous(), torch.empty(len(states), len(head))
    (rows, width), columns = states.shape, len(head)
    cpu.bf16_product(
        cpu.ROW_MAJOR, cpu.AS_IS, cpu.TRANSPOSED, rows, columns, width,
        1.0, states.data_ptr(), width, head.data_ptr(), width,
        0.0, found.data_ptr(), columns,
    )  # fmt: skip
    return found


def continue_training(
    model: Any, tokens: Tensor, steps: int, rate: float, noise: float, seed: int, batch: int
) -> dict[str, Any]:
    """Train the model in place, so that its weights leave the 4-bit grid that they came from.

    First each weight of the blocks' linears moves by a uniform number of `noise` old steps at most;
    then `steps` of AdamW over random windows [512] of `tokens`; then weights are rounded to BF16.
    Losses are of each tenth of the steps; distances in steps of the old grid, of groups of 32: 0 is
    on the grid, a mean of 0.25 is anywhere.
    """
    generator, started = torch.Generator().manual_seed(seed), time.perf_counter()
    linears, device = linears_of(model), model.device
    old = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    for linear in linears.values():
        weight = linear.weight.data
        moves = torch.rand(weight.shape, generator=generator).to(device) * 2 - 1
        weight += (moves * noise).view(len(weight), -1, 32).mul(_step(weight)).view_as(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0)
    losses: list[float] = []
    for step in range(steps):
        # Up within a tenth, then down in a straight line.
        share = min((step + 1) / max(steps // 10, 1), (steps - step) / steps)
        optimizer.param_groups[0]["lr"] = rate * share
        starts = torch.randint(0, len(tokens) - 513, (batch,), generator=generator)
        rows = torch.stack([tokens[start : start + 512] for start in starts]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(torch.bfloat16))
    means = [float(torch.stack(part).mean()) for part in _tenths(losses)]
    seconds = time.perf_counter() - started
    apart = [_distance(linear.weight.data, old[name]) for name, linear in linears.items()]
    settings = {"steps": steps, "rate": rate, "noise": noise, "seed": seed, "tokens": steps * batch}
    settings["tokens"] *= 512
    return {**settings, "losses": means, "distance": sum(apart) / len(apart), "seconds": seconds}


def _tenths(losses: list[Any]) -> list[list[Any]]:
    size = max(len(losses) // 10, 1)
    return [losses[start : start + size] for start in range(0, len(losses), size)]


def _step(weight: Tensor) -> Tensor:
    """Of the old grid: a fifteenth of each group's range. [out, in / 32, 1]"""
    groups = weight.view(len(weight), -1, 32)
    return (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15


def _distance(weight: Tensor, old: Tensor) -> float:
    """Mean distance to the nearest point of the old grid, in its steps."""
    low = old.view(len(old), -1, 32).amin(2, keepdim=True)
    at = (weight.view(len(old), -1, 32) - low) / _step(old).clamp(min=1e-12)
    return float((at - at.round()).abs().mean())
