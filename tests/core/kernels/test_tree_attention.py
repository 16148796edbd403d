"""Attention of queries that each see some of the keys, beside torch's masked product in FP64."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dpq_core.kernels.tree_attention import Seen, attend


def operands(heads, key_heads, queries, keys, size, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, queries, size), (key_heads, keys, size), (key_heads, keys, width)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def some_seen(queries, keys, share=0.3, seed=0):
    """[queries, keys], at least one key each."""
    generator = np.random.default_rng(seed)
    seen = generator.random((queries, keys)) < share
    seen[np.arange(queries), generator.integers(0, keys, queries)] = True
    return seen


def defined(query, key, value, seen, scale):
    """[queries, heads, width] fp64, by torch."""
    wide = [each[None].double() for each in (query, key, value)]
    mask = torch.from_numpy(seen)
    y = scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale, enable_gqa=True)
    return y[0].transpose(0, 1)


def of(seen):
    return Seen.of(np.ascontiguousarray(seen.T))


SHAPES = [  # heads, key heads, queries, keys, size, width
    (4, 2, 100, 130, 64, 64),
    (8, 4, 16, 16, 8, 8),
    (1, 1, 1, 1, 3, 5),
    (6, 1, 33, 7, 80, 80),
    (3, 3, 47, 300, 24, 16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_it_is_as_near_as_torch_in_fp32(shape, share):
    tensors, seen = operands(*shape), some_seen(shape[2], shape[3], share)
    expected = defined(*tensors, seen, 0.3)
    y = attend(*tensors, of(seen), 0.3)
    assert (y.shape, y.dtype) == (expected.shape, torch.float32)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_widened_and_rounded_once(dtype):
    tensors = [each.to(dtype) for each in operands(4, 2, 40, 50, 32, 32)]
    seen = of(some_seen(40, 50))
    y = attend(*tensors, seen, 0.2)
    assert torch.equal(y, attend(*(each.float() for each in tensors), seen, 0.2).to(dtype))


def test_a_query_has_the_same_bits_wherever_it_lies():
    """In another tile, beside other queries, with keys between that it does not see, and by any
    number of threads."""
    query, key, value = operands(2, 1, 20, 60, 16, 16)
    seen = some_seen(20, 60)
    whole, threads = attend(query, key, value, of(seen), 0.25), torch.get_num_threads()
    moved = attend(query[:, 5:], key, value, of(seen[5:]), 0.25)
    assert torch.equal(whole[5:], moved)
    kept = seen[7].nonzero()[0]
    alone = attend(query[:, 7:8], key[:, kept], value[:, kept], of(seen[7:8, kept]), 0.25)
    assert torch.equal(whole[7:8], alone)
    try:
        torch.set_num_threads(3)
        assert torch.equal(attend(query, key, value, of(seen), 0.25), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("offset", [-1e4, -200.0, 200.0, 1e4])
def test_scores_may_lie_anywhere(offset):
    """What lies far below the largest has no weight, and nothing overflows."""
    query, key, value = operands(1, 1, 18, 40, 8, 8)
    query[..., 0], key[..., 0] = 1, offset
    key[0, ::2, 0] = offset + 500
    seen = some_seen(18, 40, 0.5)
    y = attend(query, key, value, of(seen), 1.0)
    rounding = 4 * abs(offset) * 2**-23  # of a score
    expected = defined(query, key, value, seen, 1.0)
    assert (y - expected).abs().max() < 1e-5 + rounding


def test_its_exponential():
    """Of two keys the second has a weight that is next to nothing, and all of the value."""
    x = -torch.linspace(20, 86, 50_000)
    query, key, value = (torch.zeros(1, count, 8) for count in (len(x), 2, 2))
    query[0, :, 0], key[0, 1, 0], value[0, 1] = x, 1, 1
    y = attend(query, key, value, of(np.ones((len(x), 2), bool)), 1.0)[:, 0, 0]
    expected = x.double().exp()
    assert ((y - expected) / expected).abs().max() < 2.2e-7


@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_what_is_no_number_stays_none_where_it_is_seen(place):
    tensors = dict(zip(("query", "key", "value"), operands(1, 1, 32, 32, 8, 8), strict=True))
    seen = np.tril(np.ones((32, 32), bool))
    seen[16:, :16] = False
    clean = attend(*tensors.values(), of(seen), 1.0)
    tensors[place][0, 20] = torch.nan
    y = attend(*tensors.values(), of(seen), 1.0)
    told = range(20, 21) if place == "query" else range(20, 32)
    assert y[[*told]].isnan().all()
    assert torch.equal(y[:16], clean[:16])
