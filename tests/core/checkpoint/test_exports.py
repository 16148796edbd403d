"""A native checkpoint in other people's formats: written, verified, refused, damaged."""

import dataclasses
import json
import re
import shutil
from typing import get_args

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpq_core.checkpoint import exports
from dpq_core.checkpoint.exports import (
    EXPORTS,
    ExportError,
    export_checkpoint,
    export_to,
    failures,
    verify,
)
from dpq_core.checkpoint.exports.card import licence_of
from dpq_core.checkpoint.exports.gptq import moved_up, packed
from dpq_core.checkpoint.exports.vllm import KERNELS, environment_of, kind_of
from dpq_core.checkpoint.native import QuantizedCheckpoint, load_model, load_quantized
from dpq_core.kernels.sixteen_bit import fit
from dpq_core.layer.grid import Grid
from dpq_core.layer.records import QuantizedWeight
from dpq_core.model.reader import CheckpointError, CheckpointReader
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, ExportName, TextDataset
from dpq_core.recipe.scheme import Scheme

VOCABULARY = 97
QUERY, UP, VALUE, DOWN = (
    f"model.layers.{path}"
    for path in ("0.self_attn.q_proj", "0.mlp.up_proj", "1.self_attn.v_proj", "1.mlp.down_proj")
)
STATIC, DYNAMIC = {"group_size": 32}, {"group_size": 32, "activations": "dynamic"}
SYMMETRIC = DYNAMIC | {"symmetric": True}
HOPPER = {"preset": "hopper-vllm", "group_size": 32}
GAUDI = {"preset": "gaudi-inc", "group_size": 32}
W4A16 = {"group_size": 32, "method": "gptq", "inner": "none", "activations": "none"}
MIXED = {QUERY: "w8a8-int8", UP: "bf16", DOWN: "w8a8", VALUE: "w8a16"}
LICENCE = "---\nlicense: other\nlicense_name: small-model\n---\n\n# Base\n"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {}
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.15,
            attention_bias=True,
            tie_word_embeddings=dtype == torch.float16,
        )
        folder = folders[dtype] = tmp_path_factory.mktemp("base")
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero
                torch.nn.init.normal_(parameter, std=0.5)
        model.to(dtype).save_pretrained(folder)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "tokenizer.json").write_text("{}")
        (folder / "README.md").write_text(LICENCE)
    return folders


@pytest.fixture(scope="module")
def native(bases, tmp_path_factory):
    """A function from a scheme's fields, choices and a type to a native checkpoint's folder."""
    made = {}

    def make(scheme, choices=None, dtype=torch.bfloat16):
        key = json.dumps([scheme, choices, str(dtype)])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("native") / "checkpoint"
            windows = torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
            quantize_checkpoint(
                bases[dtype],
                made[key],
                windows,
                Scheme(**scheme, rounding="nearest"),
                CalibrationSection(dataset=TextDataset(path="none"), batch_size=2),
                {"base_model": {"id": "tiny", "digest": "0", "licence": licence_of(bases[dtype])}},
                choices,
            )
        return made[key]

    return make


@pytest.fixture(scope="module")
def exported(native, tmp_path_factory):
    """The folder of an export in small shards, for reading only."""
    made = {}

    def make(name, scheme, choices=None, dtype=torch.bfloat16):
        key = json.dumps([name, scheme, choices, str(dtype)])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("export")
            export_checkpoint(native(scheme, choices, dtype), made[key], name, shard_bytes=20_000)
        return made[key]

    return make


@torch.inference_mode()
def logits(model):
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
    return model(input_ids=tokens).logits.float()


def manifest_of(folder):
    return json.loads((folder / "export.json").read_text())


def test_the_recipe_knows_every_format():
    assert set(get_args(ExportName)) == set(EXPORTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "scheme", "choices"),
    [
        ("compressed-tensors", STATIC, {}),
        ("compressed-tensors", SYMMETRIC, {}),
        ("compressed-tensors", HOPPER, {}),
        ("compressed-tensors", W4A16, {}),
        ("compressed-tensors", STATIC, MIXED),
        ("compressed-tensors", DYNAMIC | {"inner": "int8"}, {DOWN: "bf16"}),
        ("compressed-tensors", {"bits": 8}, {}),
        ("gptq", STATIC, {UP: "bf16"}),
        ("gptq", SYMMETRIC, {}),
        ("inc", GAUDI, {UP: "bf16"}),
        ("inc", GAUDI | {"symmetric": False}, {}),
        ("fp8_to_int", GAUDI, {}),
    ],
)
def test_every_format_passes_its_checks(exported, name, scheme, choices, dtype):
    folder = exported(name, scheme, choices, dtype)
    manifest = manifest_of(folder)
    assert set(manifest["checks"]) == {"tensors", "size", "reader", "logits"}
    assert failures(manifest) == []
    assert verify(folder) == f"{name} export"
    assert 0 <= manifest["distance"] <= EXPORTS[name].arithmetic.tolerance


@pytest.mark.parametrize(
    ("name", "scheme"), [("compressed-tensors", W4A16), ("inc", GAUDI), ("fp8_to_int", GAUDI)]
)
def test_the_same_arithmetic_gives_the_same_logits(exported, name, scheme):
    assert manifest_of(exported(name, scheme))["distance"] == 0


def test_transformers_loads_mixed_layers_each_with_its_own_arithmetic(exported, native):
    folder = exported("compressed-tensors", STATIC, MIXED)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = {
        (group["format"], group["weights"]["num_bits"]): group["targets"]
        for group in config["config_groups"].values()
    }
    assert config["format"] == "mixed-precision"
    assert groups["float-quantized", 8] == [DOWN]
    assert groups["int-quantized", 8] == [QUERY]
    assert groups["pack-quantized", 8] == [VALUE]
    assert len(groups["pack-quantized", 4]) == 14 - 4
    assert config["ignore"] == ["lm_head", UP]
    model = fit(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    found = logits(model.eval())
    expected = logits(load_quantized(native(STATIC, MIXED)))
    assert 0 < (found - expected).norm() < 0.25 * expected.norm()
    schemes = {name: model.get_submodule(name).quantization_scheme for name in (QUERY, DOWN)}
    assert schemes[DOWN].weights.type == "float"
    assert schemes[QUERY].input_activations.type == "int"


def test_files_and_shards(exported, bases):
    folder = exported("compressed-tensors", STATIC)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(CheckpointReader(folder).names)
    sizes = {}
    for name, shard in index.items():
        sizes.setdefault(shard, []).append(CheckpointReader(folder).tensor(name).nbytes)
    assert len(sizes) > 3
    assert all(sum(each) <= 20_000 or len(each) == 1 for each in sizes.values())
    for name in ("chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (bases[torch.bfloat16] / name).read_bytes()


def test_four_bits_take_four_bits(exported):
    hopper = manifest_of(exported("compressed-tensors", HOPPER))["bits_per_weight"]
    assert hopper == pytest.approx(4 + 16 / 32, rel=0.02)
    asymmetric = manifest_of(exported("compressed-tensors", STATIC))["bits_per_weight"]
    assert asymmetric == pytest.approx(4 + 20 / 32, rel=0.02)


# Readers in NumPy, from the descriptions of the formats.


def nibbles(words, axis):
    """int32 → its eight nibbles, lowest first, along `axis`."""
    words = np.moveaxis(words.astype(np.uint32), axis, -1)
    parts = (words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    return np.moveaxis(parts.reshape(*words.shape[:-1], -1), -1, axis).astype(np.int64)


def read(folder, layer):
    prefix, reader = f"{layer}.", CheckpointReader(folder)
    found = {name.removeprefix(prefix): reader.tensor(name) for name in reader.under(layer)}
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in found.items()
    }


def gptq_steps(tensors):
    """(k − z) [K, N] and the group of each column, of a version 1 file."""
    codes = nibbles(tensors["qweight"], 0)
    zeros = nibbles(tensors["qzeros"], 1) + 1
    group = np.arange(len(codes)) // (len(codes) // len(zeros))
    return codes - zeros[group], group


@pytest.mark.parametrize("scheme", [STATIC, SYMMETRIC])
def test_gptq_read_independently(exported, native, scheme):
    folder = exported("gptq", scheme)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in ("bits", "group_size", "desc_act", "sym")} == {
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": scheme is SYMMETRIC,
    }
    assert config["checkpoint_format"] == "gptq"
    for layer in (QUERY, DOWN):
        tensors = read(folder, layer)
        steps, group = gptq_steps(tensors)
        assert (tensors["g_idx"] == group).all()
        weight = QuantizedCheckpoint(native(scheme)).layer(layer).weight
        scale = (weight.grid.group_scale.float() * weight.grid.channel_scale).half().float()
        exact = (weight.codes.float() - weight.grid.zero_point.repeat_interleave(32, 1)).numpy()
        found = (steps * tensors["scales"][group]).T
        assert (found == exact * scale.repeat_interleave(32, 1).numpy()).all()
        assert np.abs(found - weight.grid.decode(weight.codes).numpy()).max() < 0.05


@pytest.mark.parametrize("name", ["inc", "fp8_to_int"])
def test_gaudi_formats_read_independently(exported, native, name):
    """E4M3(s4 · (k − z)) · s8 is the evaluated weight, bit for bit."""
    folder, layer = exported(name, GAUDI), native(GAUDI)
    for member in (QUERY, DOWN):
        tensors = read(folder, member)
        steps, group = gptq_steps(tensors)
        if name == "inc":
            scale, inner = tensors["scale_bf16_to_fp8"], tensors["scales"]
        else:
            scale = tensors["w_bf16_to_fp8_scale"]
            inner = tensors["scales"] / scale
        assert scale.shape == (1,)
        assert np.log2(scale[0]) == int(np.log2(scale[0]))
        values = inner[group] * steps.astype(np.float32)
        assert np.abs(values).max() <= 240
        rounded = values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        expected = QuantizedCheckpoint(layer).layer(member)
        assert (rounded.T * scale == expected.decoded().numpy()).all()
        if name == "fp8_to_int":
            assert tensors["act_scales"][0] == expected.input_scale


def test_compressed_tensors_read_independently(exported, native):
    folder, checkpoint = exported("compressed-tensors", STATIC), QuantizedCheckpoint(native(STATIC))
    for layer in (QUERY, DOWN):
        tensors, weight = read(folder, layer), checkpoint.layer(layer).weight
        assert (nibbles(tensors["weight_packed"], 1) == weight.codes.numpy()).all()
        zeros = nibbles(tensors["weight_zero_point"], 0)
        assert (zeros == weight.grid.zero_point.numpy()).all()
        assert tensors["weight_shape"].tolist() == list(weight.codes.shape)
        assert tensors["input_scale"] == checkpoint.layer(layer).input_scale.numpy()


def weight_with_zero_point(zero_point, highest):
    codes = torch.arange(32, dtype=torch.uint8).remainder(highest + 1).expand(8, 32)
    grid = Grid(
        channel_scale=torch.ones(8, 1),
        group_scale=torch.ones(8, 1, dtype=torch.bfloat16),
        zero_point=torch.full((8, 1), zero_point, dtype=torch.uint8),
        group_size=32,
        inner=None,
    )
    return QuantizedWeight(codes.contiguous(), grid)


@pytest.mark.parametrize(
    ("zero_point", "highest", "stored"), [(0, 14, 1), (0, 15, 0), (3, 14, 3), (15, 15, 15)]
)
def test_zero_points_of_zero_move_up_where_codes_allow_it(zero_point, highest, stored):
    weight = weight_with_zero_point(zero_point, highest)
    codes, zeros = moved_up(weight)
    assert (zeros == stored).all()
    assert torch.equal(codes.int() - zeros.int(), weight.codes.int() - zero_point)
    offset = 1 if stored else 0
    words = packed(weight, offset)["qzeros"].numpy()
    assert (nibbles(words, 1) + offset == stored).all()


def test_a_file_with_a_zero_point_of_zero_is_of_the_version_that_holds_it(native, tmp_path):
    folder = tmp_path / "native"
    shutil.copytree(native(STATIC), folder)
    checkpoint = QuantizedCheckpoint(folder)
    packed_zeros = checkpoint.reader.tensor(f"{QUERY}.zero_point")
    codes = checkpoint.reader.tensor(f"{QUERY}.weight_packed")
    rewrite(folder, f"{QUERY}.zero_point", packed_zeros & 0xF0)
    rewrite(folder, f"{QUERY}.weight_packed", codes | 15)  # code 15: nothing can move up
    output = tmp_path / "gptq"
    output.mkdir()
    assert failures(export_checkpoint(folder, output, "gptq")) == []
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"


def rewrite(folder, name, tensor):
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {name: tensor}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "scheme", "choices", "reason"),
    [
        ("compressed-tensors", {"group_size": 40}, {}, "multiple of group_size 40.*w8a8"),
        ("compressed-tensors", GAUDI, {}, "fp8_max: 448"),
        (
            "compressed-tensors",
            STATIC | {"method": "none"},
            {},
            "16-bit weights with 8-bit activations",
        ),
        ("gptq", STATIC, {DOWN: "w8a8"}, f"{DOWN}.*8 bits.*4-bit weights only.*compressed-tensors"),
        ("gptq", STATIC | {"group_size": 64}, {QUERY: "w4a8-g32"}, "group_size 32 is not .* 64"),
        ("gptq", {"group_size": 40}, {}, "no multiple of 8 and of group_size 40"),
        ("inc", STATIC, {}, "needs fp8_max: 240, not 448.*gaudi-inc"),
        ("inc", GAUDI | {"channel_scale": "row"}, {}, "channel_scale: tensor"),
        ("inc", GAUDI, {DOWN: "w8a8"}, "4-bit weights only"),
        ("fp8_to_int", GAUDI | {"symmetric": False}, {}, "symmetric: True, not False"),
        ("fp8_to_int", GAUDI | {"activations": "dynamic"}, {}, "activations: static"),
        ("awq", STATIC, {}, "'awq' is no export format"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_writing(
    native, tmp_path, name, scheme, choices, reason
):
    with pytest.raises(ExportError, match=reason):
        export_checkpoint(native(scheme, choices), tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_inc_refuses_a_zero_point_that_it_cannot_hold(native, tmp_path):
    folder = tmp_path / "native"
    shutil.copytree(native(GAUDI | {"symmetric": False}), folder)
    checkpoint = QuantizedCheckpoint(folder)
    for suffix, change in (("zero_point", lambda z: z & 0xF0), ("weight_packed", lambda w: w | 15)):
        rewrite(folder, f"{QUERY}.{suffix}", change(checkpoint.reader.tensor(f"{QUERY}.{suffix}")))
    with pytest.raises(ExportError, match=rf"{QUERY}: a group's zero point is 0.*symmetric: true"):
        export_checkpoint(folder, tmp_path, "inc")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
    with pytest.raises(CheckpointError, match="content differs from the manifest's digest"):
        export_to(folder, "inc", tmp_path / "inc")
    assert not (tmp_path / "inc").exists()


# A verification that cannot fail would be none.


def broken(name, change):
    """A format whose writer makes a mistake in one layer."""
    form = EXPORTS[name]

    def tensors(layer, target, config):
        made = form.tensors(layer, target, config)
        return change(made) if target.name == DOWN else made

    return dataclasses.replace(form, tensors=tensors)


def swap_rows(made):
    key = "weight_packed" if "weight_packed" in made else "qweight"
    return made | {key: made[key].flip(0)}


def one_code(made):
    packed_codes = made["weight_packed"].clone()
    packed_codes[3, 2] ^= 1
    return made | {"weight_packed": packed_codes}


def no_scale(made):
    return {key: tensor for key, tensor in made.items() if "scale" not in key}


def not_finite(made):
    return {
        key: tensor * float("nan") if tensor.is_floating_point() else tensor
        for key, tensor in made.items()
    }


@pytest.mark.parametrize(
    ("name", "scheme", "change", "check", "said"),
    [
        ("compressed-tensors", STATIC, one_code, "reader", "they must be equal"),
        ("compressed-tensors", STATIC, swap_rows, "reader", "they must be equal"),
        ("compressed-tensors", STATIC, no_scale, "tensors", f"{DOWN}.*_scale is missing"),
        ("compressed-tensors", STATIC, not_finite, "tensors", f"{DOWN}.*has NaN"),
        ("gptq", STATIC, swap_rows, "reader", "they must be equal"),
        ("gptq", STATIC, no_scale, "tensors", f"{DOWN}.scales is missing"),
        ("inc", GAUDI, swap_rows, "reader", "they must be equal"),
    ],
)
def test_a_wrong_export_fails_its_checks(
    native, tmp_path, monkeypatch, name, scheme, change, check, said
):
    monkeypatch.setitem(exports.EXPORTS, name, broken(name, change))
    with pytest.raises(ExportError, match=f"{check}: .*{said}.*nothing was kept"):
        export_to(native(scheme), name, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []
    export_checkpoint(native(scheme), tmp_path, name)
    with pytest.raises(CheckpointError, match=f"failed its checks: .*{check}"):
        verify(tmp_path)


def test_a_byte_a_weight_fails_the_check_of_size(native, tmp_path, monkeypatch):
    form = EXPORTS["compressed-tensors"]
    short = dataclasses.replace(form, bits=lambda target: form.bits(target) / 1.03)
    monkeypatch.setitem(exports.EXPORTS, "compressed-tensors", short)
    manifest = export_checkpoint(native(STATIC), tmp_path, "compressed-tensors")
    assert "the format's arithmetic gives" in manifest["checks"]["size"]


# Damage.


@pytest.fixture(params=["native", "compressed-tensors"])
def copy(request, native, exported, tmp_path):
    folder = native(STATIC) if request.param == "native" else exported(request.param, STATIC)
    return shutil.copytree(folder, tmp_path / "copy")


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_intact_is_intact(copy):
    assert verify(copy) in ("checkpoint", "compressed-tensors export")


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_one_flipped_bit_is_found_in_any_shard(copy, position):
    for path in shards(copy):
        content = bytearray(path.read_bytes())
        place = int(position * (len(content) - 1))
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=path.name):
            verify(copy)
        content[place] ^= 1
        path.write_bytes(content)
    verify(copy)


def test_the_tensor_with_the_flipped_bit_is_named(exported, tmp_path):
    copy = shutil.copytree(exported("compressed-tensors", STATIC), tmp_path / "copy")
    for path in shards(copy):
        with safe_open(path, framework="pt") as file:
            name = file.keys()[-1]
        tensors = load_file(path)
        tensors[name].view(torch.uint8).view(-1)[0] ^= 1
        intact = path.read_bytes()
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"{path.name}.*\(tensor {re.escape(name)}\)"):
            verify(copy)
        path.write_bytes(intact)


def test_a_dropped_shard_is_named(copy):
    for path in shards(copy):
        moved = path.rename(copy / "elsewhere")
        with pytest.raises(CheckpointError, match=f"{path.name}: (file|shard) is missing"):
            verify(copy)
        moved.rename(path)


def test_two_swapped_tensors_are_found(copy):
    suffix = "weight_packed"
    gate, up = (f"model.layers.0.mlp.{part}_proj.{suffix}" for part in ("gate", "up"))
    reader = CheckpointReader(copy)
    swapped = {gate: reader.tensor(up), up: reader.tensor(gate)}
    for name, tensor in swapped.items():
        rewrite(copy, name, tensor)
    with pytest.raises(CheckpointError, match=r"content differs"):
        verify(copy)


def test_an_undeclared_shard_is_found(copy):
    shutil.copyfile(shards(copy)[0], copy / "zzz.safetensors")
    with pytest.raises(CheckpointError, match=r"zzz\.safetensors: the manifest knows no such file"):
        verify(copy)


def test_what_has_no_manifest_cannot_be_verified(bases, tmp_path):
    with pytest.raises(CheckpointError, match="nothing to verify it by"):
        verify(bases[torch.bfloat16])


@pytest.mark.parametrize("content", [{"format_version": 99}, {}])
def test_another_version_is_refused(tmp_path, content):
    (tmp_path / "export.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is unknown: this release reads 1"):
        verify(tmp_path)


def test_an_export_is_written_whole_or_not_at_all(native, tmp_path):
    folder, manifest = export_to(native(STATIC), "gptq", tmp_path / "new" / "gptq")
    assert failures(manifest) == []
    assert verify(folder) == "gptq export"
    assert [path.name for path in folder.parent.iterdir()] == ["gptq"]
    assert logits(load_model(folder)).isfinite().all()
    with pytest.raises(ExportError, match="exists: remove it"):
        export_to(native(STATIC), "gptq", folder)


# The card.


SIXTEEN = {"inner": "none", "activations": "none"}


@pytest.mark.parametrize(
    ("scheme", "form", "variables"),
    [
        ({**SIXTEEN, "method": "gptq"}, "compressed-tensors", ["VLLM_CPU_INT4_W4A8=0"]),
        ({"activations": "dynamic"}, "gptq", ["VLLM_CPU_INT4_W4A8=0"]),  # a file of W4A16
        ({"activations": "dynamic"}, "compressed-tensors", []),
        ({"preset": "ada-vllm"}, "gptq", ["VLLM_MARLIN_INPUT_DTYPE=fp8"]),
        ({"bits": 8, "activations": "none"}, "compressed-tensors", []),
        ({**SIXTEEN, "method": "none"}, "compressed-tensors", []),
    ],
)
def test_variables_without_which_vllm_computes_otherwise(scheme, form, variables):
    found = environment_of(Scheme.model_validate(scheme), form)
    assert [f"{name}={value}" for name, value in found.items()] == variables


@pytest.mark.parametrize(
    ("scheme", "known"),
    [
        ({"bits": 8, "inner": "int8", "activations": "none"}, True),
        ({"bits": 8, "activations": "none"}, False),  # FP8 weights alone: vLLM was not asked
    ],
)
def test_a_card_names_kernels_that_vllm_was_asked_for(scheme, known):
    assert (kind_of(Scheme(**scheme), "compressed-tensors") in KERNELS) == known


def test_the_card_says_what_it_is(exported, native):
    folder = exported("compressed-tensors", STATIC, MIXED)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: other\nlicense_name: small-model\nbase_model: tiny\n")
    assert "| 10 | dpq, 4 bits, asymmetric groups of 32, arithmetic in E4M3 up to 448" in card
    assert card.count("| 1 | ") == 3 + 2  # w8a8, w8a8-int8, w8a16, bf16, and what was skipped
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "Not for vLLM: model.layers.0" in card
    for name, entry in manifest_of(folder)["files"].items():
        assert f"| {name} | {entry['size']} | `{entry['sha256']}` |" in card


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LICENCE, {"license": "other", "license_name": "small-model"}),
        ("---\nlicense: mit\nlicense_link: null\n---\n", {"license": "mit"}),
        ("# A model\n", {}),
        ("---\n: {\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        (None, {}),
    ],
)
def test_the_licence_is_the_base_models(tmp_path, text, found):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == found
