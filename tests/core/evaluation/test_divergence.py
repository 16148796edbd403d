"""KL in tiles against the formula, and what it sees."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_core.evaluation.divergence import Divergence, by_request, divergence, divergences
from dpq_core.evaluation.head import Tiles


def tiles_of(logits, columns):
    """As `head.head_tiles` gives them, hidden states being numbers of rows."""

    def tiles(states):
        rows = logits[states[:, 0].long()]
        for first in range(0, rows.shape[1], columns):
            yield first, rows[:, first : first + columns]

    return Tiles(256, tiles)


def found(p, q, columns):
    states = torch.arange(len(p))[:, None].float()
    return divergence(tiles_of(p, columns), states, tiles_of(q, columns), states)


def direct(p, q):
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.integers(2, 40),
    st.integers(1, 17),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.sampled_from([0.0, 1e3]),
)
def test_tiles_give_the_formula(seed, vocabulary, columns, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(300, vocabulary, generator=generator) * 10
    q = p + torch.randn(300, vocabulary, generator=generator) * scale + shift
    p[:, 0] = -math.inf  # a piece that the model never says
    result, expected = found(p, q, columns), direct(p, q)
    torch.testing.assert_close(result.nats, expected, rtol=1e-9, atol=1e-11)
    assert result.agree.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


def test_several_candidates_are_compared_as_each_alone():
    generator = torch.Generator().manual_seed(1)
    p, *others = (torch.randn(300, 19, generator=generator) * 5 for _ in range(4))
    states = torch.arange(300)[:, None].float()
    together = divergences(tiles_of(p, 8), states, [(tiles_of(q, 8), states) for q in others])
    for each, q in zip(together, others, strict=True):
        alone = found(p, q, 8)
        assert torch.equal(each.nats, alone.nats)
        assert torch.equal(each.agree, alone.agree)


def test_a_model_does_not_diverge_from_itself():
    p = torch.randn(5, 33)
    result = found(p, p.clone(), 8)
    assert result.nats.max() < 1e-12
    assert result.agree.all()


def test_nothing_is_hidden_by_a_token_that_is_not_finite():
    p = torch.randn(4, 9)
    q = p.clone()
    q[2, 3] = math.nan
    assert found(p, q, 4).nats.isnan().tolist() == [False, False, True, False]


def test_chunks_are_joined_by_request():
    nats, requests = torch.arange(6, dtype=torch.float64), torch.tensor([2, 2, 0, 1, 0, 1])
    agree = nats % 2 == 0
    parts = [
        (requests[some], Divergence(nats[some], agree[some])) for some in (slice(3), slice(3, 6))
    ]
    whole = by_request(parts)
    assert whole.nats.tolist() == [2, 4, 3, 5, 0, 1]
    assert whole.agree.tolist() == [True, True, False, False, True, False]


def test_other_tokens_are_refused():
    tiles = tiles_of(torch.randn(4, 9), 4)
    with pytest.raises(ValueError, match="4 tokens and of 3"):
        divergence(tiles, torch.zeros(4, 1), tiles, torch.zeros(3, 1))
