"""FP8 with scales becomes the 16 bits that transformers and compressed-tensors make of it."""

import json

import pytest
import torch
from fp8_checkpoints import deepseek, fbgemm, llm_compressor, mistral
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from dpq_core.checkpoint.native import check_checkpoint, load_model, load_quantized
from dpq_core.footprint import footprint
from dpq_core.kernels import products
from dpq_core.model.fp8 import WORKSPACE
from dpq_core.model.plan import plan_layers
from dpq_core.model.reader import CheckpointError, CheckpointReader
from dpq_core.model.source import check_source
from dpq_core.model.streaming import StreamedModel
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

UP = "model.layers.1.mlp.up_proj.weight"
WINDOWS = torch.randint(97, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def by_libraries():
    with products.by_libraries():
        yield


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def check_reads(folder, expected):
    """Reader, loader and streamed model all give these parameters, to the bit."""
    check_source(folder)
    check_checkpoint(folder)
    reader = CheckpointReader(folder)
    assert set(reader.names) == set(expected)
    loaded = dict(load_model(folder, source=True).named_parameters())
    for name, value in expected.items():
        assert torch.equal(reader.tensor(name), value), name
        assert torch.equal(loaded[name], value), name
        assert reader.shape_and_type(name) == ([*value.shape], "BF16")
    stream = StreamedModel(folder)
    with stream.block(1) as block:
        streamed = {f"{stream.block_name(1)}.{n}": p for n, p in block.named_parameters()}
    assert all(torch.equal(value, expected[name]) for name, value in streamed.items())


@pytest.mark.parametrize("write", [deepseek, mistral])
def test_fp8_is_what_transformers_makes_of_it(model, tmp_path, write):
    folder = write(tmp_path / "fp8", model)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    expected = dict(theirs.named_parameters())
    assert not torch.equal(expected[UP], model.state_dict()[UP])  # it was rounded
    torch.testing.assert_close(expected[UP], model.state_dict()[UP], rtol=0.07, atol=1e-3)
    check_reads(folder, expected)
    assert torch.equal(
        load_model(folder)(input_ids=WINDOWS).logits, theirs(input_ids=WINDOWS).logits
    )


@pytest.mark.parametrize(
    ("strategy", "scale_type"),
    [
        ("channel", torch.bfloat16),
        ("channel", torch.float32),
        ("tensor", torch.bfloat16),
        ("tensor", torch.float32),
        ("block", torch.bfloat16),
    ],
)
def test_compressed_tensors_is_what_its_library_makes_of_it(model, tmp_path, strategy, scale_type):
    """With the scales as they are published: in a BF16 model it rounds FP32 ones first."""
    folder = llm_compressor(tmp_path / "fp8", model, strategy, scale_type)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=scale_type, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    expected = {
        name: value.bfloat16()
        for name, value in theirs.named_parameters()
        if not name.endswith("_scale")
    }
    assert not torch.equal(expected[UP], model.state_dict()[UP])
    check_reads(folder, expected)


def test_scales_of_activations_are_left_out(model, tmp_path):
    folder = llm_compressor(tmp_path / "fp8", model, "tensor", static=True)
    assert f"{UP.removesuffix('weight')}input_scale" in load_file(folder / "model.safetensors")
    check_source(folder)
    assert set(CheckpointReader(folder).names) == set(model.state_dict())


def test_a_row_s_scale(model, tmp_path):
    """fbgemm's, whose kernels are not here: y = x · (W8 · s)ᵀ, as `FbgemmFp8Linear.forward`."""
    folder = fbgemm(tmp_path / "fp8", model)
    stored = load_file(folder / "model.safetensors")
    exact = stored[UP].double() * stored[UP + "_scale"].double()
    expected = model.state_dict() | {
        name: (stored[name].float() * stored[name + "_scale"]).bfloat16()
        for name in stored
        if name + "_scale" in stored
    }
    assert ((expected[UP].double() - exact).abs() <= exact.abs() * 2**-8).all()
    check_reads(folder, expected)


def test_a_last_block_may_be_short(model, tmp_path):
    """As DeepSeek's `weight_dequant` has it: transformers takes other blocks there, or none."""
    folder = deepseek(tmp_path / "fp8", model, block=(80, 48))
    stored = load_file(folder / "model.safetensors")
    scale = stored[UP + "_scale_inv"]
    assert scale.shape == (3, 3)  # of [192, 128]
    assert CheckpointReader(folder).tensor(UP)[191, 127] == (
        stored[UP][191, 127].float() * scale[191 // 80, 127 // 48]
    )
    wide = scale.repeat_interleave(80, 0).repeat_interleave(48, 1)[:192, :128]
    assert torch.equal(CheckpointReader(folder).tensor(UP), (stored[UP].float() * wide).bfloat16())


def test_pieces_do_not_show(model, tmp_path, monkeypatch):
    folder = deepseek(tmp_path / "fp8", model)
    expected = CheckpointReader(folder).tensor(UP)
    monkeypatch.setattr("dpq_core.model.fp8._PIECE", 5 * 128)  # 5 rows: across blocks
    assert torch.equal(CheckpointReader(folder).tensor(UP), expected)


def test_exponents_as_scales(model, tmp_path):
    """`scale_fmt: ue8m0` of DeepSeek V3.1, in their own type."""
    folder = deepseek(tmp_path / "fp8", model)
    tensors = load_file(folder / "model.safetensors")
    scale = torch.exp2(tensors[UP + "_scale_inv"].log2().round())
    tensors[UP + "_scale_inv"] = scale.to(torch.float8_e8m0fnu)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    wide = scale.repeat_interleave(32, 0).repeat_interleave(64, 1)
    assert torch.equal(CheckpointReader(folder).tensor(UP), (tensors[UP].float() * wide).bfloat16())


def test_a_float16_model_stays_one(model, tmp_path):
    folder = deepseek(tmp_path / "fp8", model, dtype="float16")
    assert CheckpointReader(folder).tensor(UP).dtype == torch.float16
    assert load_model(folder).dtype == torch.float16


def test_the_scales_may_lie_in_another_shard(model, tmp_path):
    folder = deepseek(tmp_path / "fp8", model)
    expected = CheckpointReader(folder).tensor(UP)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {
        "a.safetensors": {n: t for n, t in tensors.items() if n.endswith("_inv")},
        "b.safetensors": {n: t for n, t in tensors.items() if not n.endswith("_inv")},
    }
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    assert torch.equal(CheckpointReader(folder).tensor(UP), expected)


def quantize(folder, out):
    calibration = CalibrationSection(
        dataset=TextDataset(path="none"), batch_size=2, min_tokens_per_input=0
    )
    return quantize_checkpoint(folder, out, WINDOWS, Scheme(group_size=64), calibration, {})


@pytest.mark.parametrize("write", [deepseek, llm_compressor])
def test_quantized_it_is_as_its_16_bits_are(model, tmp_path, write):
    """The same bytes as of the model that transformers makes of it and saves."""
    folder = write(tmp_path / "fp8", model)
    plain = tmp_path / "plain"
    sixteen = load_model(folder, source=True)
    LlamaForCausalLM.save_pretrained(sixteen, plain)
    manifests = [quantize(base, tmp_path / f"{base.name}-out") for base in (folder, plain)]
    assert manifests[0]["layers"] == manifests[1]["layers"]
    names = [name for name in manifests[0]["files"] if name.endswith(".safetensors")]
    assert [manifests[0]["files"][n] for n in names] == [manifests[1]["files"][n] for n in names]
    assert torch.isfinite(load_quantized(tmp_path / "fp8-out")(input_ids=WINDOWS).logits).all()


def test_activations_of_compressed_tensors_are_rounded_where_it_is_measured(model, tmp_path):
    """What its users run; as the source of a quantization its weights count."""
    folder = llm_compressor(tmp_path / "fp8", model)
    measured, source = (
        load_model(folder, source=source)(input_ids=WINDOWS).logits for source in (False, True)
    )
    assert not torch.equal(measured, source)
    assert (measured - source).abs().mean() < 0.2 * source.abs().mean()


def test_memory_of_reading_is_predicted(model, tmp_path):
    plan = plan_layers(StreamedModel(deepseek(tmp_path / "fp8", model)), Scheme(group_size=64))
    calibration = CalibrationSection(dataset=TextDataset(path="none"))
    without, with_fp8 = (footprint(plan, calibration, fp8=fp8) for fp8 in (False, True))
    added = WORKSPACE + 192 * 128
    assert with_fp8.block - without.block == with_fp8.layer - without.layer == added


def without_scale(tensors, quantization):
    del tensors[UP + "_scale_inv"]


def two_scales(tensors, quantization):
    tensors[UP + "_scale"] = torch.ones(1)


def short_scale(tensors, quantization):
    tensors[UP + "_scale_inv"] = tensors[UP + "_scale_inv"][:-1].contiguous()


def whole_numbers(tensors, quantization):
    tensors[UP + "_scale_inv"] = tensors[UP + "_scale_inv"].to(torch.uint8)


def no_blocks(tensors, quantization):
    quantization["weight_block_size"] = [128]


def negative_blocks(tensors, quantization):
    quantization["weight_block_size"] = [128, -1]


def not_a_number(tensors, quantization):
    tensors[UP].view(torch.uint8)[3, 5] = 0x7F


def infinite_scale(tensors, quantization):
    tensors[UP + "_scale_inv"][0, 0] = torch.inf


def scale_of_16_bits(tensors, quantization):
    """Which transformers multiplies a 16-bit weight with."""
    tensors["model.norm.weight_scale_inv"] = torch.ones(1)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_scale, rf"{UP} is F8_E4M3, and of {UP}_scale_inv .* neither is there"),
        (two_scales, rf"{UP} is F8_E4M3, and of .* both are there"),
        (
            short_scale,
            rf"{UP}_scale_inv is \[5, 2\] for a weight \[192, 128\]: blocks of \[32, 64\] ask for"
            r" \[6, 2\]",
        ),
        (whole_numbers, f"{UP}_scale_inv of U8: matrices with scales of F32"),
        (no_blocks, r"\[128\] is no size of FP8's blocks"),
        (negative_blocks, r"\[128, -1\] is no size of FP8's blocks"),
        (not_a_number, f"tensor {UP} has NaN"),
        (infinite_scale, f"tensor {UP} has an infinite value"),
        (scale_of_16_bits, r"no parameter of the model takes model\.norm\.weight_scale_inv"),
    ],
)
def test_what_is_not_as_the_format_says_is_refused(model, tmp_path, damage, expected):
    folder = deepseek(tmp_path / "fp8", model)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    damage(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=expected):
        check_checkpoint(folder)
