import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dpq_core.evaluation.perplexity import perplexity_token
from dpq_core.evaluation.scores import AFTER_BOS, PERPLEXITY
from dpq_core.verdict.pairing import difference

VOCABULARY = 259


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,  # far from uniform
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def windows():
    return torch.randint(VOCABULARY, (7, 24), generator=torch.Generator().manual_seed(1))


class Constant(nn.Module):
    """A model that gives the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)
        self.device = logits.device

    def forward(self, input_ids, use_cache):
        logits = self.logits.expand(*input_ids.shape, -1)
        return type("Output", (), {"logits": logits})


def per_token(scores):
    return [value / weight for value, weight in zip(scores.values, scores.weights, strict=True)]


def test_agrees_with_the_loss_of_transformers_window_by_window(model, windows):
    result = perplexity_token(model, windows, 3)
    with torch.inference_mode():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    assert per_token(result) == pytest.approx(losses, rel=1e-5)
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result.weights == [23] * 7
    assert len(set(result.documents)) == 7


def test_agrees_with_probabilities_in_float64(model, windows):
    with torch.inference_mode():
        probabilities = model.double()(input_ids=windows).logits.softmax(-1)
    picked = probabilities[:, :-1].gather(2, windows[:, 1:, None]).log().mean()
    assert perplexity_token(model.float(), windows, 4).value == pytest.approx(
        math.exp(-picked.item()), rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_logits_give_the_size_of_the_vocabulary(windows, dtype):
    uniform = Constant(torch.zeros(VOCABULARY, dtype=dtype))
    assert perplexity_token(uniform, windows, 2).value == pytest.approx(VOCABULARY, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_the_batch_size_does_not_matter(model, windows, batch_size):
    result = perplexity_token(model, windows, batch_size)
    reference = perplexity_token(model, windows, 3)
    assert result.values == pytest.approx(reference.values, rel=1e-5)
    assert result.documents == reference.documents
    assert result.value == pytest.approx(reference.value, rel=1e-5)


def test_a_nan_is_never_skipped(windows):
    logits = torch.zeros(VOCABULARY)
    logits[5] = math.nan
    assert math.isnan(perplexity_token(Constant(logits), windows, 2).value)


def test_one_broken_window_is_enough(model, windows):
    handle = model.lm_head.register_forward_hook(
        lambda _, inputs, output: output if len(output) > 1 else output * math.nan
    )
    result = perplexity_token(model, windows, 3)  # the last batch has one window
    handle.remove()
    assert math.isnan(result.value)
    assert [math.isnan(nats) for nats in result.values] == [False] * 6 + [True]


def test_a_hopeless_model_gives_infinity_and_no_error(windows):
    logits = torch.zeros(VOCABULARY)
    logits[0] = 1e6
    assert perplexity_token(Constant(logits), windows + 1 - windows.min(), 2).value == math.inf


def test_training_mode_is_left(model, windows):
    perplexity_token(model.train(), windows, 3)
    assert not model.training


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_windows_that_predict_nothing_are_refused(model, shape):
    with pytest.raises(ValueError, match="at least one window of at least two tokens"):
        perplexity_token(model, torch.zeros(shape, dtype=torch.int64), 2)


def test_windows_after_bos_are_another_metric_with_the_same_number(model, windows):
    plain = perplexity_token(model, windows, 3)
    after = perplexity_token(model, windows, 3, metric=AFTER_BOS)
    assert after.value == plain.value
    found = difference({PERPLEXITY: plain}, {PERPLEXITY: after}, [PERPLEXITY])
    assert found.wrong == "baseline has perplexity_token, candidate after BOS"
