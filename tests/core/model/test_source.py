"""What has the right names and shapes and is no 16-bit model is refused, by every way in."""

import json
import shutil

import pytest
import torch
from model_families import FAMILIES, save
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dpq_core.checkpoint.native import check_checkpoint, load_model
from dpq_core.model.reader import CheckpointError, CheckpointReader
from dpq_core.model.source import check_source
from dpq_core.model.streaming import StreamedModel, empty_model
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

UP = "model.layers.1.mlp.up_proj"
WINDOWS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save("llama-2", tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "model")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def to_int8(tensors):
    """As bitsandbytes stores LLM.int8(): codes, and a row's largest magnitude."""
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        largest = tensors[name].float().abs().amax(1)
        tensors[name.removesuffix("weight") + "SCB"] = largest
        codes = (tensors[name].float() / largest[:, None] * 127).round()
        tensors[name] = codes.to(torch.int8)


def to_fp8(tensors):
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name + "_scale_inv"] = torch.full((1, 1), 0.001)
        tensors[name] = (tensors[name].float() * 1000).clamp(-448, 448).to(torch.float8_e4m3fn)


def bitsandbytes(folder):
    change_tensors(folder, to_int8)
    change_config(folder, quantization_config={"quant_method": "bitsandbytes"})


def bitsandbytes_unsaid(folder):
    change_tensors(folder, to_int8)


def fp8_unsaid(folder):
    change_tensors(folder, to_fp8)


def awq(folder):
    """Said of the text model alone, where transformers looks too; the tensors are 16 bits."""
    change_config(folder, text_config={"quantization_config": {"quant_method": "awq", "bits": 4}})


def packed(folder):
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4, "strategy": "group"}}},
    }
    change_config(folder, quantization_config=quantization)


def rotated(folder):
    weights = {"type": "float", "num_bits": 8, "strategy": "channel"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"g": {"weights": weights}},
        "transform_config": {"config_groups": {"u": {"type": "hadamard"}}},
    }
    change_config(folder, quantization_config=quantization)


def modelopt(folder):
    quantization = {"quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(quantization))


def old_gptq(folder):
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4}))


def ours(folder):
    change_config(folder, quantization_config={"quant_method": "dpq", "format_version": 2})


def left_over(folder):
    scale = {f"{UP}.weight_scale": torch.ones(1), f"{UP}.input_scale": torch.ones(1)}
    change_tensors(folder, lambda tensors: tensors.update(scale))


def another_layer(folder):
    """More blocks than config.json says."""
    change_config(folder, num_hidden_layers=1)


def spare_bias(folder):
    change_tensors(folder, lambda tensors: tensors.update({f"{UP}.bias": torch.ones(96)}))


def packed_unsaid(folder):
    def change(tensors):
        weight = tensors.pop(f"{UP}.weight")
        tensors[f"{UP}.weight_packed"] = torch.zeros(len(weight), 8, dtype=torch.int32)

    change_tensors(folder, change)


def double(folder):
    change_tensors(folder, lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].double()}))


def whole_norm(folder):
    norm = {"model.norm.weight": torch.ones(64, dtype=torch.int32)}
    change_tensors(folder, lambda tensors: tensors.update(norm))


REFUSED = [
    (bitsandbytes, "quantized already: quant_method 'bitsandbytes': 16 bits and FP8"),
    (bitsandbytes_unsaid, r"tensor model\.layers\.0\.\w+\.\w+\.weight is I8: BF16, F16, F32 are"),
    (fp8_unsaid, r"weight is F8_E4M3: BF16, F16, F32 are read, and F8_E4M3 whose scales"),
    (awq, "quant_method 'awq'"),
    (packed, r"quant_method 'compressed-tensors' \(pack-quantized\)"),
    (rotated, r"quant_method 'compressed-tensors' \(float-quantized\)"),
    (modelopt, "quant_method 'modelopt'"),
    (old_gptq, "quant_method 'gptq'"),
    (ours, "quant_method 'dpq'"),
    (left_over, rf"no parameter of the model takes {UP}\.input_scale, {UP}\.weight_scale: scales"),
    (another_layer, r"takes model\.layers\.1\.\S+, \S+, \S+ and 6 more"),
    (spare_bias, rf"no parameter of the model takes {UP}\.bias"),
    (packed_unsaid, rf"{UP}\.weight is missing, and {UP}\.weight_packed there in its place"),
    (double, rf"{UP}\.weight is F64: BF16, F16, F32 are read"),
    (whole_norm, r"model\.norm\.weight is I32: BF16, F16, F32 are read"),
]


@pytest.mark.parametrize(("damage", "expected"), REFUSED)
def test_what_is_no_16_bit_model_is_refused(folder, tmp_path, damage, expected):
    check_source(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=expected):
        check_source(folder)
    with pytest.raises(CheckpointError, match=expected):
        quantize_checkpoint(folder, tmp_path / "out", WINDOWS, Scheme(), calibration(), {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [bitsandbytes_unsaid, fp8_unsaid, left_over, another_layer, spare_bias, double, whole_norm],
)
def test_it_is_not_measured_either(folder, damage):
    damage(folder)
    with pytest.raises(CheckpointError):
        check_checkpoint(folder)
    with pytest.raises(CheckpointError):
        load_model(folder)


def calibration():
    return CalibrationSection(dataset=TextDataset(path="none"), batch_size=2)


def test_buffers_of_old_files_are_left_out(folder):
    """As transformers leaves them out."""
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8),
        "model.embeddings.position_ids": torch.arange(4),
    }
    change_tensors(folder, lambda tensors: tensors.update(old))
    check_source(folder)
    assert torch.isfinite(load_model(folder)(input_ids=WINDOWS).logits).all()


def test_what_a_model_s_class_leaves_out_is_left_out(folder, monkeypatch):
    """Heads of multi-token prediction, for one: each class of transformers has a list."""
    spare = {"mtp.layers.0.weight": torch.ones(4)}
    change_tensors(folder, lambda tensors: tensors.update(spare))
    with pytest.raises(CheckpointError, match=r"takes mtp\.layers\.0\.weight"):
        check_source(folder)
    patterns = [r"^mtp.*"]
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", patterns)
    check_source(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes(tmp_path, name):
    check_source(save(name, tmp_path))


def test_a_head_that_is_stored_beside_a_tied_embedding_counts(tmp_path):
    """transformers ties the two only where they are equal."""
    folder = save("llama-3.2", tmp_path, max_shard_size="5GB")
    head = torch.ones(264, 64, dtype=torch.bfloat16)
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    check_source(folder)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(load_model(folder).lm_head.weight, head)
    assert torch.equal(theirs.lm_head.weight, head)


@pytest.mark.parametrize(
    ("stored", "said", "expected"),
    [
        (torch.float16, None, torch.float16),
        (torch.float16, "float32", torch.float16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.bfloat16),
        (torch.float16, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float16", torch.float16),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_the_type_is_that_of_the_configuration_else_that_of_the_tensors(
    folder, stored, said, expected
):
    change_tensors(folder, lambda t: t.update({name: x.to(stored) for name, x in t.items()}))
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config | ({"dtype": said} if said else {})))
    assert empty_model(folder).dtype == StreamedModel(folder).dtype == expected
    if said is None and stored != torch.float32:
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
        assert theirs.dtype == expected


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_values_that_float16_cannot_hold_are_named(folder, stored):
    """Cast, they would be infinite."""
    large = torch.full((64,), 70000.0).to(stored)
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": large}))
    check_checkpoint(folder)
    change_config(folder, dtype="float16")
    with pytest.raises(CheckpointError, match=r"norm\.weight of \w+ has values beyond 65504"):
        check_checkpoint(folder)


def test_settings_of_the_source_s_files_are_not_handed_on(folder, tmp_path):
    """A native checkpoint has shards of other names."""
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    change_config(folder, transformers_weights="weights.safetensors")
    quantize_checkpoint(folder, tmp_path / "out", WINDOWS, Scheme(group_size=32), calibration(), {})
    assert CheckpointReader(tmp_path / "out").names
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())
