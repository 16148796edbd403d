"""A 16-bit model that overflows is named with its block, and the way out leads out."""

import json
import math

import pytest
import torch
from model_families import VOCABULARY, save, tokenizer
from safetensors.torch import load_file, save_file
from scoring import evaluate_suite, perplexity

from dpq_core.checkpoint.native import load_model
from dpq_core.evaluation.forest import chunks_of
from dpq_core.evaluation.requests import asked_of_windows
from dpq_core.evaluation.scorer import answers, score
from dpq_core.evaluation.subject import subject_of
from dpq_core.evaluation.suites.definitions import SuiteSources, loaded_suites
from dpq_core.model.finite import NotFiniteError
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

WINDOWS = torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
NAMED = (
    r"^model\.layers\.1: the float16 model's hidden states .* 65504: write \"dtype\": \"bfloat16\""
)


@pytest.fixture
def overflowing(tmp_path):
    """In its last block, by a factor that BF16 holds with ease."""
    folder = save("llama-2", tmp_path / "base", torch.float16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 60000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_bf16(folder):
    """What the message says."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


def quantize(folder, out):
    section = CalibrationSection(dataset=TextDataset(path="none"), min_tokens_per_input=0)
    scheme = Scheme(group_size=32, rounding="nearest")
    return quantize_checkpoint(folder, out, WINDOWS, scheme, section, {})


def suite_of(model):
    with loaded_suites(["python_docs"], SuiteSources()) as suites:
        return evaluate_suite(model, tokenizer(), suites["python_docs"], limit=4)


def test_in_calibration(overflowing, tmp_path):
    with pytest.raises(NotFiniteError, match=NAMED):
        quantize(overflowing, tmp_path / "out")
    in_bf16(overflowing)
    quantize(overflowing, tmp_path / "out")


def test_in_perplexity(overflowing):
    with pytest.raises(NotFiniteError, match=NAMED):
        perplexity(load_model(overflowing), WINDOWS)
    in_bf16(overflowing)
    assert math.isfinite(perplexity(load_model(overflowing), WINDOWS).value)


def test_in_a_suite(overflowing):
    with pytest.raises(NotFiniteError, match=NAMED):
        suite_of(load_model(overflowing))
    in_bf16(overflowing)
    assert math.isfinite(suite_of(load_model(overflowing)).value)


def test_of_a_bf16_model_texts_and_weights_are_suspected(overflowing):
    in_bf16(overflowing)
    model = load_model(overflowing)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = math.inf
    with pytest.raises(NotFiniteError, match=r"layers\.0: the bfloat16 .* look at the texts"):
        perplexity(model, WINDOWS)


def test_a_quantized_model_s_nan_is_its_verdict(overflowing, tmp_path):
    in_bf16(overflowing)
    quantize(overflowing, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.channel_scale"][3] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    chunks = list(chunks_of(asked_of_windows(WINDOWS)))
    found = answers(score(subject_of(tmp_path / "out"), chunks), len(WINDOWS))
    assert all(math.isnan(log_likelihood) for log_likelihood, _ in found)


def test_a_head_that_is_not_finite_is_no_overflow(overflowing):
    """What is wrong is in the weights, which preflight reads."""
    in_bf16(overflowing)
    model = load_model(overflowing)
    model.lm_head.weight.data[5] = math.nan
    assert math.isnan(perplexity(model, WINDOWS).value)
