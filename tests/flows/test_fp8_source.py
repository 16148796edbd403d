"""A release of a model that is published in FP8: its 16 bits are quantized, and the baseline."""

import json
import shutil

import pytest
import torch
from conftest import run_flow
from safetensors.torch import load_file, save_file

from dpq_core.data.texts import load_texts, token_windows
from dpq_core.evaluation.forest import chunks_of
from dpq_core.evaluation.requests import asked_of_windows
from dpq_core.evaluation.results import perplexity_scores
from dpq_core.evaluation.scorer import answers, score
from dpq_core.evaluation.subject import subject_of
from dpq_core.recipe import parse_recipe
from flows.release.release import release
from tasks.support.model import load_tokenizer


@pytest.fixture(scope="module")
def in_fp8(quickstart_model, tmp_path_factory):
    """As llm-compressor writes FP8_DYNAMIC: a scale a row, activations rounded where it is run."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    shutil.copytree(quickstart_model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = (tensors[name].float().abs().amax(1, keepdim=True) / 448).bfloat16()
        codes = (tensors[name].float() / scale.float()).clamp(-448, 448)
        tensors[name] = codes.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel"},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def test_release(content, services_home, in_fp8):
    recipe = parse_recipe(
        {**content, "model": {"id": str(in_fp8)}, "registry": {"name": "fp8-source"}}
    )
    result = run_flow(release, recipe)
    assert result.verdict.verdict == "promoted"
    about = result.manifest["base_model"]
    assert about["stored_as"] == "'compressed-tensors' (float-quantized)"
    found = result.verdict.metrics["perplexity_token"]
    section = recipe.evaluation.perplexity
    windows = token_windows(load_texts(section.dataset), load_tokenizer(in_fp8), 128)
    chunks = list(chunks_of(asked_of_windows(windows)))
    source, measured = (
        perplexity_scores(windows, answers(score(subject, chunks), len(windows))).value
        for subject in (subject_of(in_fp8, source=True), subject_of(in_fp8))
    )
    assert found.baseline == pytest.approx(source, rel=1e-6)
    assert found.baseline != pytest.approx(measured, rel=1e-6)
