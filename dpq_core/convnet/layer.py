"""A convolution or linear layer with its batch norm, as one module whose weight can be rounded.

In inference batch norm is a factor of each channel and an addition, and goes into weight and bias:

    W' = W · γ/σ,  b' = β + (b − μ) · γ/σ            σ² = var + ε, of the running statistics

In fine-tuning (whitepaper, section 3.2.2) it is W' that is rounded, so that what is trained is what
will run; the output is scaled back by σ/γ for the batch norm over the batch's own statistics. In
the last epochs it is *frozen*: computed as in inference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpq_core.convnet.grids import WeightRounding


class BatchNorm(nn.Module):
    """Of the channels of a layer's output."""

    mean: Tensor
    variance: Tensor

    def __init__(
        self,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        momentum: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.gamma = nn.Parameter((torch.ones_like(mean) if gamma is None else gamma).detach())
        self.beta = nn.Parameter((torch.zeros_like(mean) if beta is None else beta).detach())
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("variance", variance.detach().clone())
        self.momentum, self.eps, self.frozen = momentum, eps, True

    @property
    def factor(self) -> Tensor:
        """γ/σ, [channels]."""
        return self.gamma * torch.rsqrt(self.variance + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """By the statistics of the batch, which move the running ones."""
        arguments = (x, self.mean, self.variance, self.gamma, self.beta)
        return functional.batch_norm(*arguments, True, self.momentum, self.eps)


class Layer(nn.Module):
    """y = operation(pad(x), W, b, *rest), and batch norm.

    name: in the network. rest: stride, padding, dilation, groups. pads: zeros around the pixels, in
    `torch.nn.functional.pad`'s order. rounding: of the weight, None leaves it alone.
    """

    def __init__(
        self,
        name: str,
        operation: Callable[..., Tensor],
        weight: Tensor | None,
        bias: Tensor | None,
        rest: Sequence[Any] = (),
        pads: Sequence[int] = (),
        norm: BatchNorm | None = None,
    ) -> None:
        super().__init__()
        assert weight is not None
        self.name, self.operation, self.rest, self.pads = name, operation, tuple(rest), tuple(pads)
        self.weight = nn.Parameter(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        self.norm = norm
        self.rounding: WeightRounding | None = None

    @property
    def convolution(self) -> bool:
        return self.operation is not functional.linear

    def forward(self, x: Tensor) -> Tensor:
        if self.pads:
            x = functional.pad(x, self.pads)
        if self.norm is None or self.norm.frozen:
            return self.operation(
                x, self._rounded(self.folded_weight), self.folded_bias, *self.rest
            )
        factor = self.norm.factor
        back = torch.where(factor == 0, 1, factor).reshape(-1, *[1] * (self.weight.dim() - 2))
        y = self.operation(x, self._rounded(self.folded_weight), None, *self.rest) / back
        if self.bias is not None:
            y = y + self.bias.reshape(back.shape)
        return self.norm.forward(y)

    @property
    def folded_weight(self) -> Tensor:
        """W', not rounded."""
        if self.norm is None:
            return self.weight
        return self.weight * self.norm.factor.reshape(-1, *[1] * (self.weight.dim() - 1))

    @property
    def folded_bias(self) -> Tensor | None:
        """b'."""
        if self.norm is None:
            return self.bias
        bias = 0 if self.bias is None else self.bias
        return self.norm.beta + (bias - self.norm.mean) * self.norm.factor

    @torch.no_grad()
    def fold(self) -> None:
        """Batch norm into weight and bias, for good."""
        if self.norm is not None:
            weight, bias = self.folded_weight, self.folded_bias
            assert bias is not None
            self.norm = None
            self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def _rounded(self, weight: Tensor) -> Tensor:
        return weight if self.rounding is None else self.rounding.forward(weight)
