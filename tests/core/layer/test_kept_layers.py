"""Layers that stay in 16 bits stay what they are: repair counts no loss for them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dpq_core.checkpoint.exports import export_checkpoint
from dpq_core.checkpoint.native import QuantizedCheckpoint, load_model, load_quantized
from dpq_core.layer.linear import W4A8Linear
from dpq_core.model.reader import CheckpointReader
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

KEPT = "model.layers.0.mlp.down_proj"
SECTION = CalibrationSection(dataset=TextDataset(path="none"))
ABOUT = {
    "base_model": {"id": "x", "revision": None, "licence": None, "trust_remote_code": False},
    "calibration": {"windows": "x"},
}


@pytest.fixture(params=["bf16", "fp16", "fp32 files of an fp16 model"])
def folder(request, tmp_path):
    """A checkpoint, and the type that its model runs in."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    dtype = torch.bfloat16 if request.param == "bf16" else torch.float16
    model = LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(tmp_path / "model")
    if "fp32" in request.param:
        path = tmp_path / "model" / "model.safetensors"
        wide = {k: t.float() * (1 + 2**-20) for k, t in load_file(path).items()}
        save_file(wide, path, {"format": "pt"})
    return tmp_path / "model", dtype


def test_a_kept_layer_is_the_16_bit_model_s(folder, tmp_path):
    """Those of FP16 models became BF16, with three bits fewer."""
    source, dtype = folder
    windows = torch.randint(61, (8, 24), generator=torch.Generator().manual_seed(1))
    native = tmp_path / "native"
    scheme = Scheme(preset="hopper-vllm", group_size=32)
    quantize_checkpoint(source, native, windows, scheme, SECTION, ABOUT, {KEPT: "bf16"})
    baseline = load_model(source).get_submodule(KEPT)
    assert baseline.weight.dtype == dtype
    checkpoint = QuantizedCheckpoint(native)
    checkpoint.verify()
    stored = checkpoint.layer(KEPT).weight
    assert stored.dtype == dtype
    assert torch.equal(stored, baseline.weight)
    kept = load_quantized(native).get_submodule(KEPT)
    assert isinstance(kept, W4A8Linear)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(kept(x), baseline(x))
    export = tmp_path / "export"
    export.mkdir()
    manifest = export_checkpoint(native, export, "compressed-tensors")
    assert not any(manifest["checks"].values()), manifest["checks"]
    assert torch.equal(CheckpointReader(export).tensor(f"{KEPT}.weight"), stored)
