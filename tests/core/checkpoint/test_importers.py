"""Other people's checkpoints: written by other code than ours, read as their formats say."""

import copy
import json

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpq_core.checkpoint.importers import _dequantize, _Layout, _unpack
from dpq_core.checkpoint.native import check_checkpoint, load_model
from dpq_core.kernels import products
from dpq_core.model.reader import CheckpointError, CheckpointReader

CONFIG = LlamaConfig(
    vocab_size=259,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.05,
    tie_word_embeddings=False,
)
TOKENS = torch.randint(259, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def by_libraries():
    """The models are compared, to the last bit, with transformers' own."""
    with products.by_libraries():
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(CONFIG, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def logits(model):
    return model(input_ids=TOKENS).logits


def write(folder, tensors, quantization):
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = CONFIG.to_dict() | {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_linear(name):
    return name.endswith("proj.weight")


# GPTQ, packed with NumPy from the format's description.


def pack(values, bits, axis):
    """Lowest bits first, along `axis`; the last word is filled up with zeros."""
    values = np.moveaxis(values.astype(np.uint64), axis, -1)
    codes = 32 // bits
    padded = np.pad(values, [(0, 0), (0, -values.shape[-1] % codes)])
    words = padded.reshape(len(values), -1, codes) << (np.arange(codes, dtype=np.uint64) * bits)
    return torch.from_numpy(np.moveaxis(words.sum(-1).astype(np.uint32).view(np.int32), -1, axis))


def quantize(weight, bits, group_size, symmetric, order):
    """Codes [out, in], scales and zero points [out, G], g_idx [in]; groups follow `order`."""
    weight = weight.float().numpy()
    group_size = weight.shape[1] if group_size == -1 else group_size
    g_idx = np.empty(weight.shape[1], dtype=np.int32)
    g_idx[order] = np.arange(weight.shape[1]) // group_size
    top = 2**bits - 1
    codes = np.empty(weight.shape, dtype=np.int64)
    scales, zeros = [], []
    for group in range(g_idx.max() + 1):
        columns = weight[:, g_idx == group]
        low, high = np.minimum(columns.min(1), 0), np.maximum(columns.max(1), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scale = np.maximum((high - low) / top, 1e-4).astype(np.float16)
        zero = np.full(len(weight), (top + 1) // 2) if symmetric else np.rint(-low / scale)
        zero = np.clip(zero, 1, top)  # what both checkpoint formats can hold
        rounded = np.rint(columns / scale[:, None]) + zero[:, None]
        codes[:, g_idx == group] = np.clip(rounded, 0, top)
        scales.append(scale)
        zeros.append(zero)
    return codes, np.stack(scales, 1), np.stack(zeros, 1).astype(np.int64), g_idx


def write_gptq(folder, model, bits=4, group_size=32, symmetric=False, act_order=False, version=1):
    """The checkpoint, and `model` with the weights that it stands for."""
    rng = np.random.default_rng(0)
    stored, restored = {}, {}
    for name, weight in model.state_dict().items():
        if not is_linear(name):
            stored[name] = restored[name] = weight
            continue
        columns = weight.shape[1]
        order = rng.permutation(columns) if act_order else np.arange(columns)
        codes, scales, zeros, g_idx = quantize(weight, bits, group_size, symmetric, order)
        layer = name.removesuffix("weight")
        stored[f"{layer}qweight"] = pack(codes.T, bits, axis=0)
        stored[f"{layer}qzeros"] = pack(zeros.T - (version == 1), bits, axis=1)
        stored[f"{layer}scales"] = torch.from_numpy(scales.T.copy())
        if act_order:
            stored[f"{layer}g_idx"] = torch.from_numpy(g_idx)
        exact = scales[:, g_idx].astype(np.float32) * (codes - zeros[:, g_idx])
        restored[name] = torch.from_numpy(exact).bfloat16()
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    model.load_state_dict(restored)
    return write(folder, stored, quantization)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"symmetric": True},
        {"version": 2},
        {"bits": 8, "symmetric": True},
        {"group_size": -1},
        {"act_order": True, "group_size": 64},
        {"act_order": True, "version": 2, "bits": 8},
    ],
    ids=str,
)
def test_gptq_has_the_logits_of_its_dequantized_weights(model, tmp_path, variant):
    original = logits(model)
    folder = write_gptq(tmp_path / "gptq", model, **variant)
    check_checkpoint(folder)
    found = logits(load_model(folder))
    assert torch.equal(found, logits(model))
    assert not torch.equal(found, original)
    assert (found - original).abs().mean() < 0.5 * original.abs().mean()


def test_codes_are_unpacked_lowest_bits_first():
    word = torch.tensor([[0x76543210, -1]], dtype=torch.int32)
    assert _unpack(word, 4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7] + [15] * 8]
    assert _unpack(word, 8).tolist() == [[0x10, 0x32, 0x54, 0x76] + [255] * 4]


LAYER = "model.layers.1.mlp.up_proj"


def drop_zeros(tensors, config):
    del tensors[f"{LAYER}.qzeros"]


def cut_scales(tensors, config):
    tensors[f"{LAYER}.scales"] = tensors[f"{LAYER}.scales"][:-1]


def wild_index(tensors, config):
    tensors[f"{LAYER}.g_idx"][3] = 99


def three_bits(tensors, config):
    config["bits"] = 3


def no_layers(tensors, config):
    for name in [name for name in tensors if name.endswith("qweight")]:
        del tensors[name]


def aqlm(tensors, config):
    config["quant_method"] = "aqlm"


def no_method(tensors, config):
    del config["quant_method"]


def marlin(tensors, config):
    config["checkpoint_format"] = "marlin"


def no_columns(tensors, config):
    config["group_size"] = 0


def no_index(tensors, config):
    del tensors[f"{LAYER}.g_idx"]


def float_codes(tensors, config):
    tensors[f"{LAYER}.qweight"] = tensors[f"{LAYER}.qweight"].float()


def spare_bias(tensors, config):
    tensors[f"{LAYER}.bias"] = torch.ones(256)


def no_head(tensors, config):
    del tensors["lm_head.weight"]


def not_finite(tensors, config):
    tensors["model.norm.weight"][7] = torch.nan


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop_zeros, rf"tensor {LAYER}\.qzeros is missing"),
        (
            cut_scales,
            rf"{LAYER}\.scales is \[3, 256\], but 4 bits in groups of 32 ask for \[4, 256\]",
        ),
        (wild_index, rf"{LAYER}\.g_idx points outside of 4 groups"),
        (three_bits, "GPTQ of 3 bits is not read, 4 or 8 are"),
        (no_layers, "no layer has a qweight"),
        (no_method, r"config\.json: quantization_config has no quant_method"),
        (marlin, "checkpoint_format 'marlin' is not read, gptq and gptq_v2 are"),
        (no_columns, "groups of 0 is not read"),
        (no_index, rf"tensor {LAYER}\.g_idx is missing"),
        (float_codes, rf"{LAYER}\.qweight is torch\.float32, expected int32"),
        (spare_bias, rf"tensor {LAYER}\.bias has no place in the model"),
        (no_head, r"tensor lm_head\.weight is missing"),
        (not_finite, r"tensor model\.norm\.weight has NaN"),
        (aqlm, "quant_method 'aqlm' is not read: 16 bits, our own, .*awq and gptq"),
    ],
)
def test_what_is_not_as_the_format_says_is_refused(model, tmp_path, damage, expected):
    folder = write_gptq(tmp_path / "gptq", model, act_order=True)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    damage(tensors, config)
    write(folder, tensors, config)
    with pytest.raises(CheckpointError, match=expected):
        load_model(folder)


def test_biases_of_zeros_that_autogptq_adds_are_left_out(model, tmp_path):
    folder = write_gptq(tmp_path / "gptq", model)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{LAYER}.bias": torch.zeros(256), "rotary_emb.inv_freq": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load_model(folder)), logits(model))


def test_settings_in_a_file_of_their_own(model, tmp_path):
    """As AutoGPTQ wrote them at first; they are then part of the checkpoint's identity."""
    folder = write_gptq(tmp_path / "gptq", model)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is missing"):
        load_model(folder)
    digest = CheckpointReader(folder).digest()
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    check_checkpoint(folder)
    assert torch.equal(logits(load_model(folder)), logits(model))
    assert CheckpointReader(folder).digest() != digest


@pytest.mark.parametrize(("offset", "stored"), [(1, 0xEDCBA98F), (0, 0xFEDCBA90)])
def test_zero_points_of_each_format(offset, stored):
    """0, 9, 10, … 15, lowest bits first. Version 1 stores them less one, and zero as the highest
    code, as AutoGPTQ reads it."""
    tensors = {
        "qweight": torch.zeros(1, 8, dtype=torch.int32),
        "qzeros": torch.from_numpy(np.array([[stored]], dtype=np.uint32).view(np.int32)),
        "scales": torch.ones(1, 8),
        "g_idx": torch.zeros(8, dtype=torch.int64),
    }
    layout = _Layout(bits=4, group_size=8, ordered=False, offset=offset)
    weight = _dequantize(tensors, layout)
    assert weight[:, 0].tolist() == [0, -9, -10, -11, -12, -13, -14, -15]


def test_the_shipped_model(quickstart_model, tmp_path):
    """Tied to its embedding, five blocks, biased by nothing: as `write` does not make them."""
    model = AutoModelForCausalLM.from_pretrained(quickstart_model, dtype=torch.bfloat16).eval()
    folder = write_gptq(tmp_path / "gptq", model, group_size=128, act_order=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    ours = json.loads((quickstart_model / "config.json").read_text())
    ours["quantization_config"] = config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(ours))
    assert torch.equal(logits(load_model(folder)), logits(model))


# compressed-tensors, packed by its own library.


def write_compressed(folder, model, symmetric=True):
    """W4AFP8, groups of 128; and `model` with the weights that it stands for."""
    scheme = preset_name_to_scheme("W4AFP8", ["Linear"])
    scheme.format = "pack-quantized"
    scheme.weights.symmetric = symmetric
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        ignore=["lm_head"],
        quantization_status="compressed",
    )
    stored, restored = {}, {}
    for name, weight in model.state_dict().items():
        if not is_linear(name):
            stored[name] = restored[name] = weight
            continue
        groups = weight.float().unflatten(1, (-1, 128))
        scale = (groups.abs().amax(-1) / 7).bfloat16()
        zeros = torch.zeros(scale.shape, dtype=torch.int8)
        if not symmetric:
            zeros += (
                torch.arange(zeros.numel()).reshape(zeros.shape).remainder(5).to(torch.int8) - 2
            )
        codes = (groups / scale.float()[..., None]).round() + zeros[..., None]
        codes = codes.clamp(-8, 7).to(torch.int8)
        layer = name.removesuffix("weight")
        stored[f"{layer}weight_packed"] = pack_to_int32(codes.flatten(1), 4)
        stored[f"{layer}weight_scale"] = scale
        stored[f"{layer}weight_shape"] = torch.tensor(weight.shape)
        if not symmetric:
            stored[f"{layer}weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0)
        restored[name] = ((codes - zeros[..., None]) * scale[..., None]).flatten(1)
    model.load_state_dict(restored)
    quantization = json.loads(config.model_dump_json()) | {"quant_method": "compressed-tensors"}
    return write(folder, stored, quantization)


def round_inputs(module, arguments):
    """FP8 a token, dynamic, in the type of the activations, as the library does it."""
    (x,) = arguments
    scale = x.abs().amax(-1, keepdim=True) / 448
    return ((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale,)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_has_the_logits_of_fake_quantization(model, tmp_path, symmetric):
    folder = write_compressed(tmp_path / "packed", model, symmetric)
    check_checkpoint(folder)
    found = logits(load_model(folder))
    weights_only = logits(model)
    for name, module in model.named_modules():
        if name.endswith("proj"):
            module.register_forward_pre_hook(round_inputs)
    assert torch.equal(found, logits(model))
    assert not torch.equal(found, weights_only)


def test_compressed_tensors_moves_to_a_device(model, tmp_path):
    folder = write_compressed(tmp_path / "packed", model, True)
    moved = load_model(folder, "meta")  # the only one that is everywhere
    assert {each.device.type for each in (*moved.parameters(), *moved.buffers())} == {"meta"}


WEIGHTS_4 = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
WEIGHTS_8 = QuantizationArgs(num_bits=8, strategy="channel")
STATIC_FP8 = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
DYNAMIC_INT8 = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)


@pytest.mark.parametrize(
    ("weights", "inputs", "file_format"),
    [
        (WEIGHTS_4, STATIC_FP8, "pack-quantized"),
        (WEIGHTS_4, None, "pack-quantized"),
        (WEIGHTS_8, DYNAMIC_INT8, "int-quantized"),
    ],
    ids=["w4a8-static", "w4a16", "w8a8-dynamic"],
)
def test_checkpoints_that_the_library_writes_itself(model, tmp_path, weights, inputs, file_format):
    scheme = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs, format=file_format
    )
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    theirs = copy.deepcopy(model)
    apply_quantization_config(theirs, config)
    for name, module in theirs.named_modules():
        if not name.endswith("proj"):
            continue
        group_size = weights.group_size or module.in_features
        groups = module.weight.detach().float().unflatten(1, (-1, group_size))
        scale = (groups.abs().amax(-1) / 2 ** (weights.num_bits - 1)).bfloat16()
        module.weight_scale.data = scale
        if inputs is STATIC_FP8:
            module.input_scale.data.fill_(2**-7)
        top = 2 ** (weights.num_bits - 1)
        codes = (groups.bfloat16() / scale[..., None]).round().clamp(-top, top - 1)
        ours = model.get_submodule(name)
        ours.weight.data = (codes * scale[..., None]).flatten(1)
        ours.register_forward_pre_hook(lambda _, arguments: (rounded(*arguments, inputs),))
    compressor = ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    theirs.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def rounded(x, inputs):
    """Activations rounded as `inputs` says, in their own type."""
    if inputs is None:
        return x
    if inputs is STATIC_FP8:
        return (x / 2**-7).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * 2**-7
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).clamp(-128, 127).round() * scale


def test_a_variant_that_does_not_load_is_refused(model, tmp_path):
    folder = write_compressed(tmp_path / "packed", model)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["format"] = "of-tomorrow"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not load this variant of compressed-tensors"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (f"{LAYER}.weight_scale", lambda t: t[:1], r"is \[1, 1\], but .* asks for \[256, 1\]"),
        ("model.embed_tokens.weight", lambda t: t.repeat(2, 1), r"is \[518, 128\], but"),
        ("model.norm.weight", lambda t: t * torch.nan, "has NaN"),
    ],
)
def test_what_the_libraries_do_not_look_at_is_refused(model, tmp_path, name, change, expected):
    folder = write_compressed(tmp_path / "packed", model)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} {expected}"):
        load_model(folder)


def with_quantization(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_rotations_at_run_time_are_refused(model, tmp_path):
    folder = write_compressed(tmp_path / "packed", model)
    apply = {"targets": ["Linear"], "location": "input"}
    rotation = {"config_groups": {"u": {"type": "hadamard", "apply": [apply]}}}
    with_quantization(folder, lambda quantization: quantization.update(transform_config=rotation))
    with pytest.raises(CheckpointError, match="transform_config is set"):
        load_model(folder)


def test_the_format_of_the_whole_is_that_of_its_groups(model, tmp_path):
    folder = write_compressed(tmp_path / "packed", model)
    before = logits(load_model(folder))
    with_quantization(folder, lambda quantization: group_of(quantization).pop("format"))
    assert torch.equal(logits(load_model(folder)), before)


def group_of(quantization):
    return quantization["config_groups"]["group_0"]


def test_compressed_tensors_that_are_missing_are_told(model, tmp_path):
    folder = write_compressed(tmp_path / "packed", model)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{LAYER}.weight_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight_scale"):
        load_model(folder)
