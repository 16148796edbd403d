"""What is asked: the harness's tokens, our two exceptions, and what is refused."""

import dataclasses

import pytest
import torch
from reference_harness import evaluate_suite
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from dpq_core.evaluation.forest import chunks_of
from dpq_core.evaluation.requests import Encoder
from dpq_core.evaluation.results import suite_scores
from dpq_core.evaluation.scorer import answers, score
from dpq_core.evaluation.subject import subject_of
from dpq_core.evaluation.suites.definitions import SuiteError, SuiteSources, loaded_suites
from dpq_core.model.context import ContextError

BYTES = ByT5Tokenizer(extra_ids=0)  # closes every text with a token


def config(**changes):
    return LlamaConfig(
        **{
            "vocab_size": 259,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            **changes,
        }
    )


@pytest.fixture
def suite():
    with loaded_suites(["python_docs"], SuiteSources()) as suites:
        yield suites["python_docs"]


@pytest.mark.parametrize("window", [2048, 60])
def test_texts_stay_open_and_are_cut_from_the_left(suite, tmp_path, window):
    """As the reference has it: a tokenizer that closes texts, a window that is too
    short."""
    torch.manual_seed(0)
    LlamaForCausalLM(config(max_position_embeddings=window)).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    expected = evaluate_suite(model, BYTES, suite, limit=12)
    asked = Encoder(BYTES, model.config).requests_of(suite, 12)
    assert (asked.truncated > 0) == (window == 60)
    subject = subject_of(tmp_path, dtype=torch.float32)
    found = answers(score(subject, list(chunks_of(asked.asked))), asked.count)
    scores = suite_scores(suite, found, asked.truncated, 12)
    assert scores.margins == pytest.approx(expected.margins, abs=1e-4)
    assert dataclasses.replace(scores, margins=expected.margins) == expected


def test_a_continuation_must_fit_into_the_window(suite):
    with pytest.raises(
        SuiteError, match=r"'python_docs': a continuation has \d+ tokens.*window 4:"
    ):
        Encoder(BYTES, config(max_position_embeddings=4)).requests_of(suite, 3)


def test_a_token_that_the_model_does_not_know_is_refused(suite):
    with pytest.raises(ContextError, match="the model's embedding has 100"):
        Encoder(BYTES, config(vocab_size=100)).requests_of(suite, 3)


def test_an_empty_context_needs_a_token_to_begin_with():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.eos_token = None
    with pytest.raises(SuiteError, match="neither a begin-of-text nor an end-of-text"):
        Encoder(tokenizer, config())


def test_answers_are_those_of_all_requests(suite):
    with pytest.raises(ValueError, match="3 answers to"):
        suite_scores(suite, [(-1.0, False)] * 3, limit=4)
