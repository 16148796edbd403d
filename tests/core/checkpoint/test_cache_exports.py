"""An FP8 cache in other people's formats: what their readers round, and who has no place for it."""

import dataclasses
import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from dpq_core.checkpoint.exports import (
    ExportError,
    check_exportable,
    export_checkpoint,
    failures,
    verify,
)
from dpq_core.checkpoint.exports.card import model_card
from dpq_core.checkpoint.exports.compressed_tensors import COMPRESSED_TENSORS
from dpq_core.checkpoint.exports.format import targets_of
from dpq_core.checkpoint.exports.verify import check_content
from dpq_core.checkpoint.native import QuantizedCheckpoint, load_quantized
from dpq_core.evaluation.forest import Asked, chunks_of
from dpq_core.evaluation.scorer import answers, score
from dpq_core.evaluation.subject import subject_of
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

NONE = {"method": "none", "inner": "none", "activations": "none", "group_size": 32}
W4A8 = {"group_size": 32, "activations": "dynamic", "symmetric": True}
GAUDI = {"preset": "gaudi-inc", "group_size": 32}
CACHE = {"kv_cache": "fp8"}
HEADS = CACHE | {"kv_cache_scale": "head"}
LAYER = "model.layers.1.self_attn"
WINDOWS = torch.randint(5, 90, (4, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A function from a scheme and a type to a checkpoint of a model with windows that slide, two
    heads of keys for four of queries, and norms of keys."""
    made = {}

    def make(scheme, dtype=torch.bfloat16):
        key = json.dumps([scheme, str(dtype)])
        if key not in made:
            torch.manual_seed(0)
            config = Gemma3TextConfig(
                vocab_size=96,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                initializer_range=0.1,
            )
            base = tmp_path_factory.mktemp("base")
            Gemma3ForCausalLM(config).to(dtype).save_pretrained(base)
            made[key] = tmp_path_factory.mktemp("native") / "checkpoint"
            section = CalibrationSection(dataset=TextDataset(path="none"), batch_size=2)
            full = Scheme(**scheme, rounding="nearest")
            quantize_checkpoint(base, made[key], WINDOWS, full, section, {})
        return made[key]

    return make


@torch.inference_mode()
def logits(model):
    return model(input_ids=WINDOWS[:2]).logits.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [NONE | CACHE, NONE | HEADS, W4A8 | CACHE, W4A8 | HEADS])
def test_the_library_s_reader_rounds_the_same_keys_and_values(native, scheme, dtype, tmp_path):
    checkpoint = native(scheme, dtype)
    manifest = export_checkpoint(checkpoint, tmp_path, "compressed-tensors")
    assert failures(manifest) == []
    assert verify(tmp_path) == "compressed-tensors export"
    about = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    found = QuantizationConfig.model_validate(about).kv_cache_scheme
    per_head = scheme["kv_cache_scale"] == "head" if "kv_cache_scale" in scheme else False
    assert (found.num_bits, found.type, found.symmetric, found.dynamic) == (8, "float", True, False)
    assert found.strategy == ("attn_head" if per_head else "tensor")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    read = model.get_submodule(LAYER)
    stored = QuantizedCheckpoint(checkpoint).reader
    for scale in ("k_scale", "v_scale"):
        expected = stored.tensor(f"{LAYER}.{scale}")
        assert torch.equal(read.get_parameter(scale), expected)
        assert expected.shape == ((2, 1, 1) if per_head else (1,))
    if scheme["activations"] == "none":  # else its own arithmetic of activations
        assert torch.equal(logits(model), logits(load_quantized(checkpoint)))


def test_an_export_is_scored_as_its_reader_computes(native, tmp_path):
    """The library's hooks go along where prefixes are shared."""
    checkpoint = native(NONE | CACHE)
    export_checkpoint(checkpoint, tmp_path, "compressed-tensors")
    rows = WINDOWS.tolist()
    asked = [Asked((*rows[0][:24], *row[:8]), 6, n) for n, row in enumerate(rows)]
    chunks = list(chunks_of(asked))
    found, expected = (
        answers(score(subject_of(folder), chunks), len(asked)) for folder in (tmp_path, checkpoint)
    )
    assert [sums for sums, _ in found] == [sums for sums, _ in expected]


@pytest.mark.parametrize("fault", ["other scale", "missing", "said by nobody"])
def test_a_wrong_cache_is_found_before_an_export_counts(native, fault, tmp_path):
    checkpoint = QuantizedCheckpoint(native(NONE | CACHE))
    export_checkpoint(checkpoint.folder, tmp_path, "compressed-tensors")
    shard, config = tmp_path / "model-00001-of-00001.safetensors", tmp_path / "config.json"
    tensors, about = load_file(shard), json.loads(config.read_text())
    if fault == "other scale":
        tensors[f"{LAYER}.k_scale"] /= 8
    elif fault == "missing":
        del tensors[f"{LAYER}.k_scale"]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        del index["weight_map"][f"{LAYER}.k_scale"]
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        about["quantization_config"]["kv_cache_scheme"] = None
    save_file(tensors, shard, {"format": "pt"})
    config.write_text(json.dumps(about))
    form = dataclasses.replace(COMPRESSED_TENSORS)
    found = check_content(tmp_path, checkpoint, form, targets_of(checkpoint))
    expected = {
        "other scale": ("reader", "logits differ by"),
        "missing": ("tensors", f"{LAYER}.k_scale is missing"),
        "said by nobody": ("reader", ""),
    }
    check, said = expected[fault]
    assert found.checks[check] is not None
    assert said in found.checks[check]


@pytest.mark.parametrize(
    ("name", "scheme", "why"),
    [
        ("gptq", W4A8, "its layout has no place for them"),
        ("inc", GAUDI, "Neural Compressor measures them itself"),
        ("fp8_to_int", GAUDI, "Neural Compressor measures them itself"),
    ],
)
def test_a_format_without_a_place_for_it_refuses(native, name, scheme, why, tmp_path):
    targets = targets_of(QuantizedCheckpoint(native(scheme | CACHE)))
    with pytest.raises(ExportError, match=f"{name} cannot hold .*{why}.*scheme.kv_cache: none"):
        check_exportable(name, targets)
    with pytest.raises(ExportError, match=why):
        export_checkpoint(native(scheme | CACHE), tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_a_token_takes(native):
    """Three layers, two heads, keys and values of 32 numbers."""
    card = model_card(QuantizedCheckpoint(native(NONE | CACHE)))
    assert (
        "| KV cache | FP8 (E4M3), a scale a layer: 384 bytes a token, of 768 in 16 bits |" in card
    )
    assert "a scale a head" in model_card(QuantizedCheckpoint(native(NONE | HEADS)))
    assert "KV cache" not in model_card(QuantizedCheckpoint(native(W4A8)))
