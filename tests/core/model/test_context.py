"""Windows are no longer than the model's context, and hold no token that it has no row for."""

import pytest
import torch
from model_families import IDS, VOCABULARY, save, tokenizer
from transformers import Gemma3TextConfig, LlamaConfig, MambaConfig, MistralConfig, Qwen2Config

from dpq_core.evaluation.requests import Encoder
from dpq_core.evaluation.suites.definitions import SuiteSources, loaded_suites
from dpq_core.model.context import (
    ContextError,
    check_ids,
    check_lengths,
    check_tokenizer,
    context_of,
)
from dpq_core.model.streaming import load_config
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme


def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096),
        # vicuna-7b-v1.5-16k: 4 times what is named
        (LlamaConfig(max_position_embeddings=4096, **rope("linear", factor=4.0)), 16384),
        (LlamaConfig(max_position_embeddings=4096, **rope("dynamic", factor=2.0)), 8192),
        # Qwen2.5 with the card's rope_scaling
        (
            Qwen2Config(
                max_position_embeddings=32768,
                **rope("yarn", factor=4.0, original_max_position_embeddings=32768),
            ),
            131072,
        ),
        # Yarn-Llama-2-7b-64k: the product is named already
        (
            LlamaConfig(
                max_position_embeddings=65536,
                **rope("yarn", factor=16.0, original_max_position_embeddings=4096),
            ),
            65536,
        ),
        # Llama 3.1
        (
            LlamaConfig(
                max_position_embeddings=131072,
                **rope("llama3", original_max_position_embeddings=8192, **LLAMA3),
            ),
            131072,
        ),
        # a token sees the 4,096 before it: windows may be longer
        (MistralConfig(max_position_embeddings=32768, sliding_window=4096), 32768),
        (Gemma3TextConfig(max_position_embeddings=32768, sliding_window=512), 32768),
        (MambaConfig(), None),
    ],
)
def test_context_of_a_configuration(config, expected):
    assert context_of(config) == expected
    if expected:
        check_lengths(config, {"calibration.sequence_length": expected})
        message = rf"calibration\.sequence_length is {expected + 1}, and .* context is {expected} "
        with pytest.raises(ContextError, match=message):
            check_lengths(config, {"calibration.sequence_length": expected + 1})
    else:
        check_lengths(config, {"calibration.sequence_length": 10**9})


def test_added_tokens_beyond_the_embedding_are_told():
    """Gemma 3's text models lack the row of `<image_soft_token>`: no error by itself."""
    fits, lacks = LlamaConfig(vocab_size=VOCABULARY), LlamaConfig(vocab_size=259)
    assert check_tokenizer(fits, tokenizer()) == []
    (line,) = check_tokenizer(lacks, tokenizer())
    assert line == (
        "tokens without a row in the model's embedding of 259: '<|vision_start|>' (259),"
        " '<|vision_end|>' (260)"
    )


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ContextError, match=r"ids up to 260, .* embedding 200 rows: .* another"):
        check_tokenizer(LlamaConfig(vocab_size=200), tokenizer())


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_texts_with_such_tokens_are_refused(kind):
    config = LlamaConfig(vocab_size=259)
    check_ids(config, tokenizer(), kind([3, 258]), "calibration")
    message = r"calibration: the texts hold token 260 \('<\|vision_end\|>'\), .* has 259 rows"
    with pytest.raises(ContextError, match=message):
        check_ids(config, tokenizer(), kind([3, IDS["<|vision_end|>"], 258]), "calibration")


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(2, 513, dtype=torch.int64), "the length of a window is 513, .* is 512 tokens"),
        (torch.full((2, 16), VOCABULARY), f"hold token {VOCABULARY}, .* has {VOCABULARY} rows"),
    ],
)
def test_plain_quantization_refuses_windows_that_the_model_cannot_read(tmp_path, windows, message):
    base = save("llama-2", tmp_path / "base")
    section = CalibrationSection(dataset=TextDataset(path="none"), min_tokens_per_input=0)
    with pytest.raises(ContextError, match=message):
        quantize_checkpoint(base, tmp_path / "out", windows, Scheme(group_size=32), section, {})


def test_a_suite_with_such_tokens_is_refused_before_anything_runs(tmp_path):
    config = load_config(save("llama-2", tmp_path))
    config.vocab_size = 100
    with (
        loaded_suites(["python_docs"], SuiteSources()) as suites,
        pytest.raises(ContextError, match=r"python_docs: the texts hold token 220 .* has 100 rows"),
    ):
        Encoder(tokenizer(), config).requests_of(suites["python_docs"], 4)
