"""What the kernel benchmarks of both devices share: layers of random codes, the check before the
clock, rows of results."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor, nn

from dpq_core.arithmetic.formats import round_to
from dpq_core.layer.grid import SYMMETRIC_ZERO_POINT, Grid
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.records import LayerReport, QuantizedLinear, QuantizedWeight, RoundedWeight
from dpq_core.layer.storage import stored_bytes
from dpq_core.recipe.scheme import Scheme

Linear = Callable[[Tensor], Tensor]

W4A8 = Scheme(activations="dynamic")
W4A16 = Scheme(method="rtn", rounding="nearest", inner="none", activations="none")
W8A8 = Scheme(bits=8, activations="dynamic")


@dataclass
class Row:
    """A shape at a number of tokens. microseconds: by method, of those that ran."""

    out: int
    features: int
    tokens: int
    microseconds: dict[str, float] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)  # of the limit, where one is known

    def ratio(self, method: str, base: str) -> float:
        """How many times as fast as `base`."""
        return self.microseconds[base] / self.microseconds[method]


def random_layer(out: int, features: int, scheme: Scheme, device: str) -> QuantizedLinear:
    """Time does not ask what the codes are; errors ask for scales as a model has them."""
    generator = torch.Generator(device).manual_seed(0)
    report = LayerReport(error=float("nan"), damp_frac=float("nan"), codes_moved=0)
    shape = (out, features)
    channel = torch.rand(out, 1, generator=generator, device=device) * 1e-4 + 1e-4
    if scheme.bits == 8:
        values = torch.randn(shape, generator=generator, device=device) * 100
        stored = RoundedWeight(values.clamp(-448, 448).to(torch.float8_e4m3fn), channel)
        return QuantizedLinear(scheme, stored, None, report)
    groups = (out, features // scheme.group_size)
    scale = torch.rand(groups, generator=generator, device=device) * 20 + 10
    if scheme.inner == "none":
        scale, channel = scale * 2e-4, torch.ones_like(channel)
    zero = torch.full(groups, SYMMETRIC_ZERO_POINT, dtype=torch.uint8, device=device)
    if not scheme.symmetric:
        zero.random_(6, 11, generator=generator)
    codes = torch.empty(shape, dtype=torch.uint8, device=device).random_(16, generator=generator)
    grid = Grid(channel, scale.bfloat16(), zero, scheme.group_size, scheme.inner_format)
    return QuantizedLinear(scheme, QuantizedWeight(codes, grid), None, report)


def assert_as_good(module: nn.Module, layer: QuantizedLinear, x: Tensor) -> None:
    """The kernel's error of each token is at most twice the definition's."""
    reference = W4A8Linear(layer, None)
    scale = reference._input_scale(x)
    x8 = x.float() if scale is None else round_to(x.float() / scale, reference.inner)
    exact = x8.double() @ reference.weight8.double().T * reference.channel_scale.double()
    exact = exact if scale is None else exact * scale
    found, allowed = ((y.double() - exact).abs().amax(1) for y in (module(x), reference(x)))
    worst = (found / allowed).max().item()
    if not worst <= 2:
        raise SystemExit(f"{layer.scheme.bits} bits {list(x.shape)}: error {worst:.2f} × reference")


def rotated(module: nn.Module, bytes_: int, cache: int) -> Iterator[nn.Module]:
    """The module and copies of it in turn, `cache` bytes of weights in all: each comes from memory,
    as it does in a model whose layers are called one after the other."""
    copies = [copy.deepcopy(module) for _ in range(max(1, cache // bytes_))]
    return cycle([module, *copies])


def weight_bytes(out: int, features: int, scheme: Scheme | None) -> int:
    """Of a weight as stored; None: BF16."""
    return 2 * out * features if scheme is None else stored_bytes(out, features, scheme)
