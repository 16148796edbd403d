"""A layer's loss guessed from its objective: one backward pass for all layers and choices.

    proxy(layer, choice) = ½ · E‖δy‖² · E‖g‖² / out        E‖δy‖² = error · E‖y‖²

y is the layer's output [out] of a token, `error` its relative squared error (the layer objective),
and g the gradient of a window's negative log-likelihood with respect to y, the labels drawn from
the model itself. E[g gᵀ] is then the Fisher information of y, and ½ δyᵀ E[g gᵀ] δy the divergence
to second order (Amari, "Natural Gradient Works Efficiently in Learning", 1998). The proxy takes
that matrix for a multiple of unity and knows nothing of rounded activations, so it is held against
the measured loss (`dpq_core.sensitivity`), and decides nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpq_core.streaming import StreamedModel

_SEED = 0  # of the labels


@dataclass
class OutputMoments:
    """Of one layer, means over tokens. output: E‖y‖². gradient: E‖g‖², nats² per unit of y²."""

    rows: int
    output: float = 0.0
    gradient: float = 0.0

    def loss(self, error: float) -> float:
        """The proxy of a choice with this relative error, in nats a token."""
        return 0.5 * error * self.output * self.gradient / self.rows


def output_moments(
    stream: StreamedModel,
    windows: Tensor,  # [n, length] int64
    batch_size: int,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, OutputMoments]:
    """Moments of every linear of every block, by full name.

    Memory: one block with its gradients' graph for a batch, and the hidden states before every
    block. `on_progress` is called after each block, forward and back.
    """
    states = [stream.embed(windows, batch_size)]
    for block in range(stream.block_count):
        states.append(states[-1].clone())
        with stream.block(block):
            stream.advance(states[-1], batch_size)
        on_progress()
    gradient = _of_sampled_labels(stream, states.pop())
    found: dict[str, OutputMoments] = {}
    for block in reversed(range(stream.block_count)):
        with stream.block(block) as module, ExitStack() as hooks:
            prefix = stream.block_name(block)
            for name in stream.linears(block):
                linear = module.get_submodule(name.removeprefix(f"{prefix}."))
                found[name] = hooks.enter_context(_observed(linear, windows.numel()))
            _pass_back(stream, states.pop(), gradient, batch_size)
        on_progress()
    return found


def _of_sampled_labels(stream: StreamedModel, hidden: Tensor) -> Tensor:
    """Gradient with respect to the last hidden states, a window at a time. Same shape and type."""
    generator = torch.Generator().manual_seed(_SEED)
    gradient = torch.empty_like(hidden)
    with stream.head() as logits_of:
        for window in range(len(hidden)):
            state = hidden[window : window + 1].clone().requires_grad_()
            logs = logits_of(state)[0].float().log_softmax(-1)
            labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)
            likelihood = logs.gather(-1, labels.to(logs.device)).sum()
            (gradient[window : window + 1],) = torch.autograd.grad(-likelihood, state)
    return gradient


def _pass_back(stream: StreamedModel, before: Tensor, gradient: Tensor, batch_size: int) -> None:
    """Turn the gradient after the loaded block into the one before it, in place."""
    for inputs, outer in zip(before.split(batch_size), gradient.split(batch_size), strict=True):
        inputs = inputs.clone().requires_grad_()
        outer.copy_(torch.autograd.grad(stream.forward(inputs), inputs, outer)[0])


@contextmanager
def _observed(linear: nn.Module, tokens: int) -> Iterator[OutputMoments]:
    """Moments that fill while the linear runs forward and back."""
    assert isinstance(linear, nn.Linear)
    moments = OutputMoments(linear.out_features)

    def count_gradient(gradient: Tensor) -> None:
        moments.gradient += gradient.float().square().sum().item() / tokens

    def count_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        moments.output += output.detach().float().square().sum().item() / tokens
        output.register_hook(count_gradient)

    handle = linear.register_forward_hook(count_output)
    try:
        yield moments
    finally:
        handle.remove()
