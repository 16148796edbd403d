"""An engine's log-likelihoods beside ours: against whole distributions in float64."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpq_core.attestation.agreement import agreement, exceeded
from dpq_core.evaluation.subject import subject_of
from dpq_core.recipe import AttestLimits

VOCABULARY = 61


def tiny(folder, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.4,
        dtype=torch.float32,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, tiny(folder, 0), tiny(tmp_path_factory.mktemp("other"), 1)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logs_of(model, windows):
    """[windows, length − 1, vocabulary] float64."""
    return model(windows).logits[:, :-1].double().log_softmax(-1)


def said_by(model, windows, top):
    """As a client gives it: a mapping a token."""
    rows = []
    for window, logs in zip(windows[:, 1:].tolist(), logs_of(model, windows), strict=True):
        entries = []
        for token, row in zip(window, logs, strict=True):
            pieces = {token, *row.topk(top).indices.tolist()}
            entries.append({piece: row[piece].item() for piece in pieces})
        rows.append(entries)
    return rows


def test_a_model_agrees_with_itself(models, windows):
    folder, model, _ = models
    found = agreement(
        subject_of(folder, dtype=torch.float32), windows, said_by(model, windows, 5), 5
    )
    assert found.predictions == 3 * 16
    assert found.max_difference < 1e-4
    assert found.divergence < 1e-4
    assert found.top1_agreement == 1
    assert exceeded(found, AttestLimits()) == []


def test_figures_are_those_of_whole_distributions(models, windows):
    folder, model, other = models
    ours, theirs = logs_of(model, windows), logs_of(other, windows)
    found = agreement(
        subject_of(folder, dtype=torch.float32),
        windows,
        said_by(other, windows, VOCABULARY),
        VOCABULARY,
    )
    targets = windows[:, 1:, None]
    apart = (ours.gather(-1, targets) - theirs.gather(-1, targets)).flatten()
    assert found.mean_difference == pytest.approx(apart.abs().mean().item(), rel=1e-4)
    assert found.max_difference == pytest.approx(apart.abs().max().item(), rel=1e-4)
    assert found.bias == pytest.approx(apart.mean().item(), rel=1e-4)
    exact = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    assert found.divergence == pytest.approx(exact, rel=1e-4)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    assert found.top1_agreement == pytest.approx(same)
    assert found.loss - found.engine_loss == pytest.approx(-found.bias)


def test_fewer_pieces_give_a_lower_bound(models, windows):
    folder, _, other = models
    subject, tops = subject_of(folder, dtype=torch.float32), (1, 4, 16, VOCABULARY)
    found = [agreement(subject, windows, said_by(other, windows, t), t).divergence for t in tops]
    assert found == sorted(found)
    assert 0 < found[0] < found[-1]


def test_of_equally_likely_pieces_any_is_the_same(models, windows):
    folder, model, _ = models
    said = said_by(model, windows, 5)
    for entries in said:
        for entry in entries:
            least = min(entry, key=entry.get)
            entry[least] = max(entry.values())
    found = agreement(subject_of(folder, dtype=torch.float32), windows, said, 5)
    assert found.top1_agreement == 1
    for entries in said:
        for entry in entries:
            entry[min(entry)] += 1e-3 + max(entry.values()) - entry[min(entry)]
    other = agreement(subject_of(folder, dtype=torch.float32), windows, said, 5)
    assert other.top1_agreement < 1


def test_another_model_is_beyond_all_limits(models, windows):
    folder, _, other = models
    found = agreement(
        subject_of(folder, dtype=torch.float32), windows, said_by(other, windows, 20), 20
    )
    reasons = "; ".join(exceeded(found, AttestLimits()))
    for name in AttestLimits.model_fields:
        assert f"{name} is " in reasons
    assert "does the engine serve another one?" in reasons


def test_a_limit_itself_passes_and_no_number_does_not(models, windows):
    folder, model, _ = models
    said = said_by(model, windows, 5)
    found = agreement(subject_of(folder, dtype=torch.float32), windows, said, 5)
    limits = AttestLimits(mean_difference=found.mean_difference)
    assert exceeded(found, limits) == []
    said[1][3] = dict.fromkeys(said[1][3], math.nan)
    broken = agreement(subject_of(folder, dtype=torch.float32), windows, said, 5)
    assert any(each.startswith("mean_difference is nan nats") for each in exceeded(broken, limits))
    assert broken.as_dict()["mean_difference"] is None


def test_all_tokens_are_asked_for(models, windows):
    folder, model, _ = models
    said = said_by(model, windows, 5)
    with pytest.raises(ValueError, match="said 32 of 48 tokens"):
        agreement(subject_of(folder, dtype=torch.float32), windows, said[:2], 5)
    del said[0][0][int(windows[0, 1])]
    with pytest.raises(ValueError, match="said nothing of token"):
        agreement(subject_of(folder, dtype=torch.float32), windows, said, 5)
