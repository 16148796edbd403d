"""vLLM in an environment of its own (docs/attest.md), and exports for it: of every scheme that an
engine may read."""

import os

import pytest
import torch

from dpq_core.checkpoint.exports import export_to
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

_NEAREST = {"method": "rtn", "rounding": "nearest", "group_size": 128}
_W4A16 = {**_NEAREST, "inner": "none", "activations": "none"}
_W8A8 = {**_NEAREST, "bits": 8}

_ADA = {**_NEAREST, "preset": "ada-vllm"}

# What a row of the table in docs/exports.md is called: scheme and format.
EXPORTS = {
    "W4A8, preset hopper-vllm": ({**_NEAREST, "preset": "hopper-vllm"}, "compressed-tensors"),
    "W4A8, static activations": ({**_NEAREST, "symmetric": True}, "compressed-tensors"),
    "W4A8, INT8 arithmetic": (
        {**_NEAREST, "symmetric": True, "inner": "int8", "activations": "dynamic"},
        "compressed-tensors",
    ),
    "W4A8, preset ada-vllm": (_ADA, "compressed-tensors"),
    "W4A8, ada-vllm": (_ADA, "gptq"),
    "W8A8, FP8": ({**_W8A8, "activations": "dynamic"}, "compressed-tensors"),
    "W8A8, INT8": ({**_W8A8, "inner": "int8", "activations": "dynamic"}, "compressed-tensors"),
    "W8A16, INT8": ({**_W8A8, "inner": "int8", "activations": "none"}, "compressed-tensors"),
    "W4A16": ({**_W4A16, "symmetric": True}, "compressed-tensors"),
    "W4A16, symmetric": ({**_W4A16, "symmetric": True}, "gptq"),
    "W4A16, asymmetric": (_W4A16, "gptq"),
}

# Not of the table, which is about linears.
_CACHED = {**_W8A8, "inner": "int8", "activations": "dynamic", "kv_cache": "fp8"}
WITH_CACHE = {"FP8 cache": (_CACHED, "compressed-tensors")}


@pytest.fixture(scope="session")
def vllm_python():
    """The Python of vLLM's environment."""
    python = os.environ.get("DPQ_VLLM_PYTHON")
    if not python:
        pytest.skip("vLLM: DPQ_VLLM_PYTHON names no environment of it")
    return python


@pytest.fixture(scope="session")
def export_rows():
    return EXPORTS


@pytest.fixture(scope="session")
def exported(quickstart_model, tmp_path_factory):
    """A folder of the shipped model, rounded to nearest, as a row of `EXPORTS`."""
    made = {}

    def make(name):
        if name not in made:
            scheme, form = (EXPORTS | WITH_CACHE)[name]
            folder = tmp_path_factory.mktemp("export") / "native"
            tokens = torch.randint(259, (4, 64), generator=torch.Generator().manual_seed(0))
            calibration = CalibrationSection(
                dataset=TextDataset(path="none"), batch_size=4, min_tokens_per_input=0
            )
            parsed = Scheme.model_validate(scheme)
            quantize_checkpoint(quickstart_model, folder, tokens, parsed, calibration, {})
            made[name] = export_to(folder, form)[0]
        return made[name]

    return make
