"""The fused pass of many tokens through a linear, by each way that a processor may go.

`test_linear` asks that the way which is chosen here is the definition.
"""

import pytest
import torch
from product_cases import normal
from torch.nn.functional import linear

from dpq_core.arithmetic.formats import FORMATS, round_to
from dpq_core.kernels import blas, forward_rows, products

WAYS = {
    "MKL": (True, False),
    "panels": (True, True),
    "FP32": (False, False),
}  # bf16_units, in_panels


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    there = {"MKL": blas.bf16_product, "FP32": blas.sgemm}
    if request.param == "panels" and not products.by_vectors():
        pytest.skip("the processor has no units for BF16 in its vectors (AVX512_BF16)")
    if there.get(request.param, "") is None:
        pytest.skip("this torch comes without MKL")
    units, panels = WAYS[request.param]
    monkeypatch.setattr(products, "bf16_units", lambda: units)
    monkeypatch.setattr(products, "in_panels", lambda: panels)
    return request.param


@pytest.mark.usefixtures("way")
def test_one_kernel_is_compiled_whatever_a_linear_has():
    """For the layout of channel scales that are one, another was: a second of each process."""
    x, weight = torch.ones(70, 80).bfloat16(), torch.ones(48, 80).bfloat16()
    kernel, _ = forward_rows._way(70, 80, 1)
    forward_rows.forward(x, weight, None)
    before = list(kernel.signatures)
    every_second = torch.ones(96)[::2]
    forward_rows.forward(x, weight, every_second, every_second, torch.ones(70, 1))
    assert kernel.signatures == before


SHAPES = [  # tokens, in, out: whole tiles, panels and registers, what is left over, and more
    (2, 8, 3), (3, 1, 1), (5, 33, 64), (6, 32, 65), (7, 31, 15), (65, 1111, 67), (130, 64, 128),
    (515, 600, 130), (1000, 96, 24), (13, 4133, 70),
]  # fmt: skip


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("inner", [None, "e4m3", "int8"])
@pytest.mark.parametrize(("tokens", "features", "out"), SHAPES)
def test_errors_are_at_most_twice_those_of_the_definition(tokens, features, out, inner, strided):
    wide, weight = normal(0, tokens, features + 3 * strided), normal(1, out, features)
    x, bias = wide[:, 3 * strided :], normal(2, out)
    x = x.flip(1).T.contiguous().T if strided else x
    channels, scale = torch.rand(out), (x.abs().amax(1, keepdim=True) / 100).float()
    inner = inner and FORMATS[inner]
    x8 = x.float() if inner is None else round_to(x.float() / scale, inner)
    scale = None if inner is None else scale
    defined = linear(x8, weight.float()) * channels * (1 if scale is None else scale) + bias
    exact = linear(x8.double(), weight.double()) * channels * (1 if scale is None else scale) + bias
    y = forward_rows.forward(x, weight, bias, channels, scale, inner)
    each = exact.abs().amax(1, keepdim=True)
    error, allowed = (((found - exact) / each).abs() for found in (y, defined.bfloat16()))
    assert y.dtype == torch.bfloat16
    assert error.max() <= 2 * allowed.max()
    assert (y == defined.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("features", [64, 600, 4133])
def test_a_token_has_the_same_bits_in_any_batch_and_by_any_threads(way, features):
    """Of a token alone in panels only."""
    x, weight = normal(0, 515, features), normal(1, 130, features)
    scale, before = (x.abs().amax(1, keepdim=True) / 448).float(), torch.get_num_threads()

    def multiplied(first, last):
        some = slice(first, last)
        return forward_rows.forward(x[some], weight, None, None, scale[some], FORMATS["e4m3"])

    whole = multiplied(0, 515)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for first, last in ((0, 515), (0, 2), (5, 70), (69, 514), (7, 8)):
                if last - first > 1 or way == "panels":
                    assert torch.equal(multiplied(first, last), whole[first:last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("features", [63, 64])
def test_what_is_not_finite_stays_with_its_token(features):
    """Also where the last pair of columns is not whole, and the next token's first stands there."""
    x, weight = normal(0, 20, features), normal(1, 70, features)
    y = forward_rows.forward(x, weight, None)
    x[3, -1], x[4, 0], x[7, 5] = torch.inf, -torch.inf, torch.nan
    found, others = forward_rows.forward(x, weight, None), torch.ones(20, dtype=torch.bool)
    others[[3, 4, 7]] = False
    assert torch.equal(found[others], y[others])
    assert not found[~others].isfinite().any()


def test_numbers_below_the_normal_ones_count_as_zero_in_panels_only(way):
    if way == "MKL":
        pytest.skip("it does not say what it does")
    x, weight = torch.full((7, 4), 2.0**-130).bfloat16(), torch.full((5, 4), 2.0**100).bfloat16()
    expected = 0 if way == "panels" else 2.0**-28
    assert (forward_rows.forward(x, weight, None) == expected).all()
