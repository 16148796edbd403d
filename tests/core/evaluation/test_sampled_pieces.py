"""Divergences over some pieces of a vocabulary, against those over all."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpq_core.evaluation.divergence import divergences
from dpq_core.evaluation.head import head_tiles
from dpq_core.evaluation.sampled_pieces import _chances, sample_pieces
from dpq_core.model.streaming import StreamedModel

PIECES, TOKENS, SIZE = 1_500, 120, 200


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=PIECES,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.6,  # a few pieces are likely, and others after each token
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return StreamedModel(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def states():
    return torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def others(states):
    """Of models that are nearer and nearer."""
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    return [states + by * noise for by in (0.3, 0.03, 0.003)]


def losses(stream, states, others, sample=None):
    with head_tiles(stream, 64, sample) as tiles:
        found = divergences(tiles, states, [(tiles, each) for each in others])
    return torch.stack([each.nats.mean() for each in found])


@pytest.mark.parametrize(
    ("size", "furthest", "bias"), [(400, 0.12, 0.05), (800, 0.03, 0.01), (1_200, 0.01, 0.002)]
)
def test_divergences_are_those_of_all_pieces(stream, states, others, size, furthest, bias):
    """Of few tokens, each with pieces of its own: on a text a sample of this share is nearer."""
    exact = losses(stream, states, others)
    found = torch.stack(
        [
            losses(stream, states, others, sample_pieces(stream, states, size, seed))
            for seed in range(12)
        ]
    )
    apart = found / exact - 1
    assert apart.abs().max() < furthest
    assert apart.mean(0).abs().max() < bias


def test_a_sample_is_of_the_likely_pieces_and_some_others(stream, states):
    sample = sample_pieces(stream, states, SIZE)
    assert len(sample.pieces) in (SIZE, SIZE - 1)  # a sum of floats may end below a whole number
    assert (sample.pieces.diff() > 0).all()
    with head_tiles(stream) as tiles:
        logits = torch.cat([tile for _, tile in tiles.logits(states)], 1)
    said = logits.softmax(-1).square().sum(0).sqrt().double()
    chances = 1 / sample.weights.double()
    certain = chances == 1
    assert 10 < certain.sum() < SIZE
    assert set(said.topk(10).indices.tolist()) <= set(sample.pieces[certain].tolist())
    ratio = said[sample.pieces[~certain]] / chances[~certain]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)


def test_the_same_seed_gives_the_same_pieces(stream, states):
    first, again, other = (sample_pieces(stream, states, SIZE, seed) for seed in (0, 0, 1))
    assert torch.equal(first.pieces, again.pieces)
    assert not torch.equal(first.pieces, other.pieces)


def test_a_head_is_whole_again_after_a_sample(stream, states, others):
    before = losses(stream, states, others)
    losses(stream, states, others, sample_pieces(stream, states, SIZE))
    assert torch.equal(losses(stream, states, others), before)


def test_a_small_vocabulary_is_taken_whole(stream, states):
    assert sample_pieces(stream, states, PIECES) is None


@pytest.mark.parametrize("size", [3, 5, 40])
def test_pieces_that_are_never_said_are_never_taken(size):
    weight = torch.tensor([0, 4, 1, 0, 1, 1, 0.5], dtype=torch.float64).repeat(2)
    chances = _chances(weight, size)
    assert (chances[weight == 0] == 0).all()
    assert float(chances.sum()) == pytest.approx(min(size, int((weight > 0).sum())))
    assert chances.max() <= 1


def test_predictions_that_are_not_finite_are_no_sample(stream, states):
    broken = states.clone()
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match="16-bit model's predictions are not finite"):
        sample_pieces(stream, broken, SIZE)
