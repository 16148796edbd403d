"""A layer's loss guessed from its objective: one backward pass for all layers and choices.

    proxy(layer, choice) = ½ · E‖δy‖² · E‖g‖² / out        E‖δy‖² = error · E‖y‖²

y is the layer's output [out] of a token, `error` its relative squared error (the layer objective),
and g the gradient of a window's negative log-likelihood with respect to y, the labels drawn from
the model itself. E[g gᵀ] is then the Fisher information of y, and ½ δyᵀ E[g gᵀ] δy the divergence
to second order (Amari, "Natural Gradient Works Efficiently in Learning", 1998). The proxy takes
that matrix for a multiple of unity and knows nothing of rounded activations, so it is held against
the measured loss (`dpq_core.repair.sensitivity`), and decides nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpq_core.model.inputs import Batch
from dpq_core.model.streaming import StreamedModel

SEED = 0  # of the labels


@dataclass(frozen=True)
class OutputMoments:
    """Of one layer. output: ‖y‖² over its inputs, a token of the model. gradient: ‖g‖², a vector
    of its inputs (an expert sees some tokens, a vision tower patches); nats² per unit of y²."""

    rows: int
    output: float
    gradient: float

    def loss(self, error: float) -> float:
        """The proxy of a choice with this relative error, in nats a token."""
        return 0.5 * error * self.output * self.gradient / self.rows


def output_moments(
    stream: StreamedModel,
    batches: Sequence[Batch],  # before the first block; not changed
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, OutputMoments]:
    """Moments of every linear of every block, by full name.

    Memory: one block with its gradients' graph for a batch, and the hidden states before every
    block. `on_progress` is called after each block, forward and back.
    """
    states = [[batch.clone() for batch in batches]]
    for block in range(stream.block_count):
        states.append([batch.clone() for batch in states[-1]])
        with stream.block(block):
            stream.advance(states[-1])
        on_progress()
    last = states.pop()
    gradients = _of_sampled_labels(stream, last)
    tokens = sum(batch.inputs["input_ids"].numel() for batch in batches)
    found: dict[str, OutputMoments] = {}
    for block in reversed(range(stream.block_count)):
        with stream.block(block) as module, ExitStack() as hooks:
            prefix = stream.block_name(block)
            sums = {
                name: hooks.enter_context(
                    _observed(module.get_submodule(name.removeprefix(f"{prefix}.")))
                )
                for group in stream.groups(block)
                for name in group
            }
            gradients = [
                _passed_back(stream, before, after)
                for before, after in zip(states.pop(), gradients, strict=True)
            ]
        found |= {name: each.moments(tokens) for name, each in sums.items()}
        on_progress()
    return found


def _of_sampled_labels(stream: StreamedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """Gradients with respect to the last hidden states, of their shapes; a window at a time."""
    generator = torch.Generator().manual_seed(SEED)
    gradients = [torch.empty_like(batch.hidden) for batch in batches]
    with stream.head() as logits_of:
        for batch, gradient in zip(batches, gradients, strict=True):
            for window in range(len(gradient)):
                state = batch.hidden[window : window + 1].clone().requires_grad_()
                logs = logits_of(state)[0].float().log_softmax(-1)
                labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)
                likelihood = logs.gather(-1, labels.to(logs.device)).sum()
                (gradient[window : window + 1],) = torch.autograd.grad(-likelihood, state)
    return gradients


def _passed_back(stream: StreamedModel, before: Batch, after: Tensor) -> Tensor:
    """The gradient before the loaded block, from the one after it."""
    batch = before.clone()
    batch.hidden.requires_grad_()
    return torch.autograd.grad(stream.forward(batch), batch.hidden, after)[0]


@dataclass
class _Sums:
    rows: int
    inputs: int = 0
    output: float = 0.0
    gradient: float = 0.0

    def moments(self, tokens: int) -> OutputMoments:
        return OutputMoments(self.rows, self.output / tokens, self.gradient / max(self.inputs, 1))


@contextmanager
def _observed(linear: nn.Module) -> Iterator[_Sums]:
    """Sums that grow while the linear runs forward and back."""
    assert isinstance(linear, nn.Linear)
    sums = _Sums(linear.out_features)

    def count_gradient(gradient: Tensor) -> None:
        sums.gradient += gradient.float().square().sum().item()

    def count_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sums.inputs += output.numel() // sums.rows
        sums.output += output.detach().float().square().sum().item()
        output.register_hook(count_gradient)

    handle = linear.register_forward_hook(count_output)
    try:
        yield sums
    finally:
        handle.remove()
