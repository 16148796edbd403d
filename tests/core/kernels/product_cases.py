"""Products of BF16 operands against float64: how far FP32 sums in any order may be from it.

    python tests/core/kernels/product_cases.py      prints the arithmetic, and "as defined" if it is

as a process of its own, because the libraries read their environment when they are loaded.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dpq_core.kernels import products
from dpq_core.kernels.attention import attend_in_fp32
from dpq_core.kernels.sixteen_bit import linear
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.records import LayerReport, QuantizedLinear, RoundedWeight
from dpq_core.recipe.scheme import Scheme

_ROUNDING = 2.0**-24  # of FP32, relative


def normal(seed: int, *shape: int) -> Tensor:
    """BF16 numbers of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape, generator=generator) * 3
    return (torch.randn(shape, generator=generator) * spread.exp2()).bfloat16()


def check_linear(seed: int, tokens: int, features: int, out: int, with_bias: bool) -> None:
    x, weight = normal(seed, tokens, features), normal(seed + 1, out, features)
    bias = normal(seed + 2, out) if with_bias else None
    y = linear(x, weight, bias)
    added = torch.zeros(out).double() if bias is None else bias.double()
    exact = x.double() @ weight.double().T + added
    terms = x.double().abs() @ weight.double().abs().T + added.abs()
    assert y.dtype == torch.bfloat16
    _assert_within(y, exact, terms, features)


def check_eight_bits(seed: int, tokens: int, features: int, out: int) -> None:
    """Whole numbers, whose sums are exact: any order gives the same bits."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 9, (out, features), generator=generator).float()
    channels = torch.rand(out, 1, generator=generator)
    weight = RoundedWeight(values.to(torch.float8_e4m3fn), channels)
    scheme, report = Scheme(bits=8), LayerReport(0, 0, 0)
    module = W4A8Linear(QuantizedLinear(scheme, weight, torch.tensor(0.5), report), None)
    x = torch.randint(-8, 9, (tokens, features), generator=generator).bfloat16()
    sums = (2 * x).double() @ values.double().T  # 16 at most: 8-bit numbers
    expected = sums.float() * channels.flatten() * 0.5
    assert torch.equal(module(x), expected.bfloat16())


def check_hessian(seed: int, tokens: int, features: int) -> None:
    x = normal(seed, tokens, features)
    statistics = InputStatistics.empty(features)
    for part in x.tensor_split(2):
        statistics.add_hessian(part)
    found, wide = statistics.hessian_sum, x.double()
    allowed = 2 * wide.abs().T @ wide.abs() * (tokens + 4) * _ROUNDING
    assert ((found.double() - 2 * wide.T @ wide).abs() <= allowed).all()


def check_attention(seed: int, length: int, queries: int, masked: bool) -> None:
    """Nearer to float64 than torch's in BF16 may be, which rounds its weights too."""
    query, key, value = (normal(seed + n, 2, 4, length, 16).clamp(-4, 4) for n in range(3))
    query = query[:, :, :queries]
    mask = torch.arange(length) < length - 1 if masked and length > 1 else None
    mask = None if mask is None else mask.expand(2, 1, queries, length)
    found = _Attention()(query, key, value, mask)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)
    error = (found.transpose(1, 2).double() - exact).abs()
    assert found.dtype == torch.bfloat16
    share = 2.0**-7 if products.bf16_units() else 2.0**-8 * 1.01  # of BF16: half a step
    assert (error <= share * value.double().abs().amax()).all()
    assert products.bf16_units() or (error <= share * exact.abs() + 1e-4).all()


class _Attention(nn.Module):
    """What a model that `sixteen_bit.fit` was given calls."""

    is_causal = False

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"_attn_implementation": "sdpa"})()

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def forward(self, *operands: Tensor | None) -> Tensor:
        from transformers import AttentionInterface

        if not products.bf16_units():
            attend_in_fp32(self)
        call = AttentionInterface()[self.config._attn_implementation]
        found: Tensor = call(self, *operands)[0]
        return found


def _assert_within(y: Tensor, exact: Tensor, terms: Tensor, summands: int) -> None:
    """y is BF16's nearest to a sum in FP32, in some order, of these terms."""
    wrong = terms * (summands + 2) * _ROUNDING
    allowed = wrong + 2.0**-8 * (exact.abs() + wrong)
    assert ((y.double() - exact).abs() <= allowed).all()


def check_all() -> None:
    for seed, (tokens, features, out) in enumerate(
        [(1, 8, 3), (2, 2100, 300), (63, 64, 257), (130, 40, 1), (700, 96, 24), (0, 5, 5)]
    ):
        check_linear(seed, tokens, features, out, with_bias=bool(seed % 2))
        check_eight_bits(seed, tokens, features, out)
        check_hessian(seed, tokens, min(features, 600))
    check_attention(0, 40, 40, masked=False)
    check_attention(1, 33, 1, masked=True)


if __name__ == "__main__":
    check_all()
    print(products.described())
    print("as defined")
