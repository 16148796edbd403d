"""From a 16-bit checkpoint to a packed one and back: written, verified, loaded, refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dpq_core.arithmetic.packing import pack_codes
from dpq_core.checkpoint import writing as checkpoint_writing
from dpq_core.checkpoint.native import (
    MANIFEST,
    QuantizedCheckpoint,
    load_layer,
    load_model,
    load_quantized,
    save_layer,
)
from dpq_core.digests import file_digest
from dpq_core.errors import InputError
from dpq_core.kernels.sixteen_bit import fit
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import quantize_layer
from dpq_core.layer.records import LayerReport, QuantizedWeight
from dpq_core.layer.storage import layer_from_tensors
from dpq_core.model.inputs import batches_of
from dpq_core.model.reader import CheckpointError, CheckpointReader
from dpq_core.model.streaming import StreamedModel
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.layer_choices import CHOICES, chosen_scheme
from dpq_core.recipe.scheme import Scheme

VOCABULARY = 97
SCHEME = Scheme(group_size=24, rounding="nearest")  # 64 inputs: a short last group
DOWN = "model.layers.1.mlp.down_proj"
MEMBERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def calibration(**changes):
    changes = {"min_tokens_per_input": 0} | changes
    return CalibrationSection(dataset=TextDataset(path="none"), batch_size=2, **changes)


def random_model(model_class, config_class, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,  # logits that differ
    }
    model = model_class(config_class(**sizes | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero
            torch.nn.init.normal_(parameter, std=0.5)
    return model.bfloat16().eval()


# name → the checkpoint's model and how it is saved
BASES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}, {}),
    "llama-tied-sharded": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True},
        {"max_shard_size": "60KB"},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}, {"max_shard_size": "60KB"}),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}, {}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {}
    for name, (model_class, config_class, changes, saving) in BASES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model = random_model(model_class, config_class, **changes)
        model.save_pretrained(folders[name], **saving)
        sharded = (folders[name] / "model.safetensors.index.json").is_file()
        assert sharded == bool(saving)
    return folders


@pytest.fixture(scope="module")
def windows():
    return torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def written(bases, windows, tmp_path_factory):
    """A checkpoint of the plain llama, to read."""
    folder = tmp_path_factory.mktemp("written") / "checkpoint"
    quantize_checkpoint(bases["llama"], folder, windows, SCHEME, calibration(), {"by": "test"})
    return folder


@pytest.fixture
def damaged(written, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(written, tmp_path / "damaged")


def logits_of(model, windows):
    with torch.no_grad():
        return model(input_ids=windows).logits


def original(folder):
    return fit(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())


def by_hand(base, folder, scheme, blocks=2, choices=None):
    """The transformers model with the linears of its first blocks replaced from the tensors as
    they lie on disk."""
    model = original(base)
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    for name, module in linears_of(model, range(blocks)).items():
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(name)}
        choice = (choices or {}).get(name, "w4a8")
        layer = layer_from_tensors(own, module.in_features, chosen_scheme(scheme, choice))
        model.set_submodule(name, W4A8Linear(layer, module.bias))
    return model


def linears_of(model, blocks):
    prefixes = tuple(f"model.layers.{block}." for block in blocks)
    modules = dict(model.named_modules())
    return {n: m for n, m in modules.items() if n.endswith(MEMBERS) and n.startswith(prefixes)}


def rewrite_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Writing and loading


@pytest.mark.parametrize(
    ("base", "changes", "feeding"),
    [
        ("llama", {}, {}),
        ("llama", {}, {"propagation": "quantized"}),
        ("llama", {}, {"hessian_inputs": "bf16"}),
        ("llama", {"activations": "dynamic", "symmetric": True}, {"propagation": "quantized"}),
        ("llama", {"method": "none"}, {}),
        ("llama", {"method": "gptq", "inner": "none", "activations": "none"}, {}),
        ("llama", {"inner": "int8", "activations": "dynamic"}, {}),
        ("llama-tied-sharded", {}, {}),
        ("qwen2", {"rounding": "gradient"}, {}),
        ("qwen2-tied", {"fp8_max": 240, "power_of_two": True}, {"propagation": "quantized"}),
    ],
    ids=str,
)
def test_written_verified_loaded_and_equal_to_replacing_by_hand(
    bases, windows, tmp_path, base, changes, feeding
):
    scheme = Scheme(**SCHEME.model_dump() | changes)
    folder = tmp_path / "checkpoint"
    manifest = quantize_checkpoint(
        bases[base], folder, windows, scheme, calibration(**feeding), {"base_model": "tiny"}
    )
    assert manifest["base_model"] == "tiny"
    assert [row["name"].rpartition(".")[2] for row in manifest["layers"]] == [*MEMBERS, *MEMBERS]
    assert manifest["skipped"] == {"lm_head": "output head, kept in 16 bits"}
    QuantizedCheckpoint(folder).verify()
    logits = logits_of(load_quantized(folder), windows)
    assert torch.equal(logits, logits_of(by_hand(bases[base], folder, scheme), windows))
    before = logits_of(original(bases[base]), windows).float()
    error = (logits.float() - before).norm() / before.norm()
    assert 0 < error < 0.35


MIXED = {
    "model.layers.0.self_attn.q_proj": "w8a8",
    "model.layers.0.mlp.down_proj": "bf16",
    "model.layers.1.self_attn.o_proj": "w8a8-int8",
    "model.layers.1.self_attn.q_proj": "w8a16",
    DOWN: "w4a8-g32",
}


@pytest.mark.parametrize("base", ["llama", "qwen2-tied"])
def test_layers_of_their_own_choice(bases, windows, tmp_path, base):
    folder = tmp_path / "mixed"
    manifest = quantize_checkpoint(
        bases[base], folder, windows, SCHEME, calibration(), {}, choices=MIXED
    )
    QuantizedCheckpoint(folder).verify()
    rows = {row["name"]: row for row in manifest["layers"]}
    assert {name: row["scheme"] for name, row in rows.items() if row["scheme"]} == {
        name: {
            field: value
            for field, value in CHOICES[choice].items()
            if value != getattr(SCHEME, field)
        }
        for name, choice in MIXED.items()
    }
    sizes = {n: 8 * r["bytes"] / (r["shape"][0] * r["shape"][1]) for n, r in rows.items()}
    assert sizes["model.layers.0.mlp.down_proj"] == 16
    assert 8 < sizes["model.layers.0.self_attn.q_proj"] < 8.6
    assert rows["model.layers.0.mlp.down_proj"]["error"] == 0
    expected = by_hand(bases[base], folder, SCHEME, choices=MIXED)
    assert torch.equal(logits_of(load_quantized(folder), windows), logits_of(expected, windows))


@pytest.mark.parametrize(
    ("choices", "expected"),
    [({"model.layers.9.mlp.up_proj": "w8a8"}, "no linear"), ({DOWN: "w9"}, "'w9' is no choice")],
)
def test_a_choice_that_cannot_be_met_is_refused(bases, windows, tmp_path, choices, expected):
    with pytest.raises(ValueError, match=expected):
        quantize_checkpoint(
            bases["llama"], tmp_path / "out", windows, SCHEME, calibration(), {}, choices=choices
        )


@pytest.mark.parametrize("base", ["llama", "qwen2"])  # without and with biases
@pytest.mark.parametrize("propagation", ["original", "quantized"])
def test_layers_are_those_of_the_whole_model_observed(bases, windows, tmp_path, propagation, base):
    """Streaming, calibrating and packing against hooks on the model in memory, whose first blocks
    are the quantized ones where these feed the others."""
    base, folder = bases[base], tmp_path / "out"
    quantize_checkpoint(base, folder, windows, SCHEME, calibration(propagation=propagation), {})
    checkpoint = QuantizedCheckpoint(folder)
    for block in (0, 1):
        replaced = block if propagation == "quantized" else 0
        linears, statistics = observed(by_hand(base, folder, SCHEME, replaced), block, windows)
        assert len(linears) == len(MEMBERS)
        for name, module in linears.items():
            expected = quantize_layer(module.weight, statistics[name], SCHEME)
            layer = checkpoint.layer(name)
            assert torch.equal(layer.input_scale, expected.input_scale), name
            assert torch.equal(layer.weight.codes, expected.weight.codes), name


def observed(model, block, windows):
    """A block's linears and their statistics: static scales first, then Hessians of FP8 inputs."""
    linears = linears_of(model, [block])
    statistics = {name: InputStatistics.empty(m.in_features) for name, m in linears.items()}
    scales = {}

    def observe(name):
        def hook(_, arguments):
            if name not in scales:
                statistics[name].add_magnitudes(arguments[0])
                return
            x8 = (arguments[0].float() / scales[name]).clamp(-448, 448).to(torch.float8_e4m3fn)
            x8 = x8.float()
            x8 = (x8 / x8.norm(dim=-1, keepdim=True)).bfloat16()
            x8[:, 0] *= (0.125 / 0.875 * (x8.shape[1] - 1)) ** 0.5
            statistics[name].add_hessian(x8)

        return hook

    for name, module in linears.items():
        module.register_forward_pre_hook(observe(name))
    for _ in range(2):
        for batch in windows.split(2):
            logits_of(model, batch)
        for name, seen in statistics.items():
            top = seen.magnitudes.nonzero().max().to(torch.int16).view(torch.bfloat16).float()
            scales[name] = top / 448
    return linears, statistics


def test_hessian_inputs_matter(bases, windows, written, tmp_path):
    """Otherwise the recipe's option would be without effect."""
    feeding = calibration(hessian_inputs="bf16")
    quantize_checkpoint(bases["llama"], tmp_path / "out", windows, SCHEME, feeding, {})
    codes = [QuantizedCheckpoint(f).layer(DOWN).weight.codes for f in (written, tmp_path / "out")]
    assert not torch.equal(*codes)


@pytest.mark.parametrize("change", [{"token_weights": "plain"}, {"first_token_share": 0}])
def test_token_weights_matter(bases, windows, written, tmp_path, change):
    """Otherwise the recipe's option would be without effect."""
    feeding = calibration(**change)
    quantize_checkpoint(bases["llama"], tmp_path / "out", windows, SCHEME, feeding, {})
    codes = [QuantizedCheckpoint(f).layer(DOWN).weight.codes for f in (written, tmp_path / "out")]
    assert not torch.equal(*codes)


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_written_twice_is_byte_identical(
    bases, windows, written, tmp_path, monkeypatch, shard_bytes
):
    first = written
    if shard_bytes:
        monkeypatch.setattr(checkpoint_writing, "_SHARD_BYTES", shard_bytes)
        first = tmp_path / "first"
        quantize_checkpoint(bases["llama"], first, windows, SCHEME, calibration(), {"by": "test"})
        assert len(list(first.glob("*.safetensors"))) > 2
    second = tmp_path / "second"
    quantize_checkpoint(bases["llama"], second, windows, SCHEME, calibration(), {"by": "test"})
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    QuantizedCheckpoint(first).verify()
    assert torch.equal(
        logits_of(load_quantized(first), windows), logits_of(load_quantized(written), windows)
    )


def test_packed_is_four_bits_and_a_little(windows, tmp_path):
    model = random_model(
        LlamaForCausalLM, LlamaConfig, hidden_size=256, intermediate_size=512, num_hidden_layers=1
    )
    model.save_pretrained(tmp_path / "base")
    scheme = Scheme(group_size=128, rounding="nearest", method="rtn")
    manifest = quantize_checkpoint(
        tmp_path / "base", tmp_path / "out", windows, scheme, calibration(), {}
    )
    tensors = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    stored = sum(t.nbytes for name, t in tensors.items() if "_proj." in name)
    weights = sum(row["shape"][0] * row["shape"][1] for row in manifest["layers"])
    assert weights == 256 * (256 + 128 + 128 + 256 + 512 + 512 + 512)
    assert manifest["bytes_per_weight"] == stored / weights
    assert 0.5 < stored / weights <= 0.54


def test_what_is_not_quantized_stays(bases, written):
    before, after = CheckpointReader(bases["llama"]), CheckpointReader(written)
    kept = [name for name in before.names if not name.removesuffix(".weight").endswith(MEMBERS)]
    assert "lm_head.weight" in kept
    assert "model.layers.0.input_layernorm.weight" in kept
    for name in kept:
        assert torch.equal(after.tensor(name), before.tensor(name))


def test_layers_narrower_than_a_group_are_named(bases, windows, tmp_path):
    scheme = SCHEME.model_copy(update={"group_size": 80})  # only down_proj has as many inputs
    folder = tmp_path / "out"
    manifest = quantize_checkpoint(bases["llama"], folder, windows, scheme, calibration(), {})
    assert [row["name"] for row in manifest["layers"]] == [
        f"model.layers.{block}.mlp.down_proj" for block in (0, 1)
    ]
    assert manifest["skipped"]["model.layers.1.self_attn.q_proj"] == (
        "64 inputs are fewer than group_size 80"
    )
    QuantizedCheckpoint(folder).verify()
    assert logits_of(load_quantized(folder), windows).isfinite().all()
    with pytest.raises(CheckpointError, match="group_size 100"):
        quantize_checkpoint(
            bases["llama"],
            tmp_path / "none",
            windows,
            SCHEME.model_copy(update={"group_size": 100}),
            calibration(),
            {},
        )


@pytest.mark.parametrize("method", ["dpq", "none"])
def test_single_layers_round_trip(tmp_path, method):
    scheme = SCHEME.model_copy(update={"method": method})
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics.empty(40)
    statistics.add_hessian(x)
    statistics.add_magnitudes(x)
    layer = quantize_layer(x[:9], statistics, scheme)
    save_layer(tmp_path, layer)
    again = load_layer(tmp_path)
    assert torch.equal(again.decoded(), layer.decoded())
    assert torch.equal(again.input_scale, layer.input_scale)
    assert again.report == layer.report


# Streaming


@pytest.mark.parametrize("base", BASES)
def test_streamed_blocks_give_the_models_logits(bases, windows, base):
    stream = StreamedModel(bases[base])
    batches = stream.begin(batches_of(windows, batch_size=4))
    for index in range(stream.block_count):
        with stream.block(index):
            stream.advance(batches)
    assert torch.equal(stream.logits(batches[0].hidden), logits_of(original(bases[base]), windows))
    assert not any(True for _ in stream.model.parameters())  # and nothing stays in memory


@pytest.mark.parametrize("base", BASES)
def test_load_model_of_a_16_bit_checkpoint(bases, windows, base):
    model = load_model(bases[base])
    assert torch.equal(logits_of(model, windows), logits_of(original(bases[base]), windows))


def test_wider_checkpoints_run_in_bf16(tmp_path, windows):
    model = random_model(LlamaForCausalLM, LlamaConfig).float()
    model.save_pretrained(tmp_path)
    assert CheckpointReader(tmp_path).tensor("lm_head.weight").dtype == torch.float32
    assert StreamedModel(tmp_path).dtype == torch.bfloat16
    assert torch.equal(
        logits_of(load_model(tmp_path), windows), logits_of(original(tmp_path), windows)
    )


def test_load_model_of_a_quantized_checkpoint(written, windows):
    assert torch.equal(
        logits_of(load_model(written), windows), logits_of(load_quantized(written), windows)
    )


# Quantized checkpoints that are refused

SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
FILES = ["config.json", "generation_config.json", SHARD, INDEX]


def test_the_manifest_knows_every_file(written):
    assert sorted(json.loads((written / MANIFEST).read_text())["files"]) == FILES
    assert sorted(path.name for path in written.iterdir()) == sorted([*FILES, MANIFEST])


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_refused(damaged, name):
    content = bytearray((damaged / name).read_bytes())
    content[-1] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        QuantizedCheckpoint(damaged).verify()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("mask", [1, 0x80])
@pytest.mark.parametrize("name", FILES)
def test_a_bit_flipped_anywhere_is_refused(damaged, name, share, mask):
    content = bytearray((damaged / name).read_bytes())
    content[int(share * len(content))] ^= mask
    (damaged / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=str(damaged)):
        QuantizedCheckpoint(damaged).verify()


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_is_refused(damaged, name, share):
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=name):
        QuantizedCheckpoint(damaged).verify()


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_missing_file_is_refused(damaged, name):
    (damaged / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        QuantizedCheckpoint(damaged).verify()


@pytest.mark.parametrize("version", [1, 3, "2", None])
def test_unknown_version_is_refused(damaged, version):
    rewrite_json(damaged / MANIFEST, lambda m: m.update(format_version=version))
    for reader in (QuantizedCheckpoint, load_quantized):
        with pytest.raises(CheckpointError, match=rf"format version {version} is unknown"):
            reader(damaged)


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b'"text"', b"{}", b"\xff{}", b'{"format_version": 2}']
)
def test_manifest_of_another_shape_is_refused(damaged, content):
    (damaged / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=MANIFEST):
        QuantizedCheckpoint(damaged)


def test_folder_without_a_manifest_is_refused(damaged):
    (damaged / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no dpq\.json"):
        load_quantized(damaged)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 98},
        {"hidden_size": 128},
        {"intermediate_size": 128},
        {"num_key_value_heads": 4},
        {"num_attention_heads": 2, "head_dim": 64},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
    ],
    ids=str,
)
def test_config_of_another_shape_is_refused(damaged, change):
    rewrite_json(damaged / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        QuantizedCheckpoint(damaged).verify()
    with pytest.raises(CheckpointError, match="model"):  # loading does not read the digests
        load_quantized(damaged)


def sign(folder):
    """Make the manifest's digests those of the files again."""

    def update(manifest):
        for name in manifest["files"]:
            path = folder / name
            manifest["files"][name] = {
                "sha256": file_digest(path),
                "size": path.stat().st_size,
            }

    rewrite_json(folder / MANIFEST, update)


@pytest.mark.parametrize(
    ("tensor", "change", "said"),
    [
        (f"{DOWN}.group_scale", lambda t: t.float(), r"is F32 \[64, 4\], expected BF16 \[64, 4\]"),
        (
            f"{DOWN}.weight_packed",
            lambda t: t[:, 1:],
            r"is I32 \[64, 11\], expected I32 \[64, 12\]",
        ),
        (f"{DOWN}.channel_scale", lambda t: t[1:], r"\[63, 1\]"),
        (f"{DOWN}.input_scale", lambda t: t * torch.nan, "NaN"),
        (f"{DOWN}.group_scale", lambda t: t * torch.inf, "infinite"),
        (f"{DOWN}.zero_point", None, "missing"),
        ("model.norm.weight", None, "missing"),
        ("model.norm.weight", lambda t: t[1:], r"is BF16 \[63\], expected BF16 \[64\]"),
        ("lm_head.weight", None, "missing"),
    ],
)
def test_wrong_tensor_with_the_right_digest_is_refused(damaged, tensor, change, said):
    tensors = load_file(damaged / SHARD)
    taken = tensors.pop(tensor)
    if change:
        tensors[tensor] = change(taken).contiguous()
    else:
        rewrite_json(damaged / INDEX, lambda index: index["weight_map"].pop(tensor))
    save_file(tensors, damaged / SHARD)
    sign(damaged)
    with pytest.raises(CheckpointError, match=said) as caught:
        QuantizedCheckpoint(damaged).verify()
    assert tensor in str(caught.value)


def test_signed_again_is_accepted(damaged):
    """So that the refusals above are for the tensors' sake."""
    tensors = load_file(damaged / SHARD)
    codes = torch.zeros(64, 96, dtype=torch.uint8)
    save_file(tensors | {f"{DOWN}.weight_packed": pack_codes(codes)}, damaged / SHARD)
    sign(damaged)
    checkpoint = QuantizedCheckpoint(damaged)
    checkpoint.verify()
    layer = checkpoint.layer(DOWN)
    assert isinstance(layer.weight, QuantizedWeight)
    assert torch.equal(layer.weight.codes, codes)


# Base checkpoints that are refused


@pytest.fixture
def base_copy(bases, tmp_path):
    return shutil.copytree(bases["llama-tied-sharded"], tmp_path / "base")


def shard_of(folder, tensor):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


@pytest.mark.parametrize(("bad", "kind"), [(torch.nan, "NaN"), (-torch.inf, "infinite")])
@pytest.mark.parametrize("name", [f"{DOWN}.weight", "model.norm.weight"])
def test_tensor_that_is_not_finite_is_named(base_copy, name, bad, kind):
    CheckpointReader(base_copy).check_finite()
    path = shard_of(base_copy, name)
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = bad
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=kind) as caught:
        CheckpointReader(base_copy).check_finite()
    assert name in str(caught.value)
    assert path.name in str(caught.value)


def test_quantizing_nan_is_an_error_and_leaves_no_checkpoint(base_copy, windows, tmp_path):
    path = shard_of(base_copy, f"{DOWN}.weight")
    tensors = load_file(path)
    tensors[f"{DOWN}.weight"][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"not finite|NaN"):
        quantize_checkpoint(base_copy, tmp_path / "out", windows, SCHEME, calibration(), {})
    assert not (tmp_path / "out").exists()


def test_missing_shard_is_named(base_copy):
    path = shard_of(base_copy, f"{DOWN}.weight")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name}: shard is missing"):
        CheckpointReader(base_copy)


def test_truncated_shard_is_named(base_copy):
    path = shard_of(base_copy, f"{DOWN}.weight")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{path.name}: truncated or damaged"):
        CheckpointReader(base_copy)


def test_tensor_that_the_index_promises_is_named(base_copy):
    path = shard_of(base_copy, "model.norm.weight")
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        CheckpointReader(base_copy)


@pytest.mark.parametrize("outside", ["../stolen.safetensors", "sub/x.safetensors", "/etc/passwd"])
def test_index_that_points_outside_is_refused(base_copy, outside):
    save_file({"secret": torch.ones(1)}, base_copy.parent / "stolen.safetensors")
    rewrite_json(base_copy / INDEX, lambda index: index["weight_map"].update(secret=outside))
    with pytest.raises(CheckpointError, match="not a plain file name") as caught:
        CheckpointReader(base_copy)
    assert outside in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(bases, tmp_path, name):
    shutil.copy(bases["llama"] / "config.json", tmp_path)
    torch.save({"model.norm.weight": torch.ones(64)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: pickled weights, which are not loaded"):
        StreamedModel(tmp_path)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("gpt2", "'gpt2'.*Conv1D.*not quantized"), (None, r"config\.json.*`None`")],
)
def test_a_model_type_that_is_not_quantized_is_refused(base_copy, model_type, reason):
    rewrite_json(base_copy / "config.json", lambda config: config.update(model_type=model_type))
    with pytest.raises(InputError, match=reason):
        StreamedModel(base_copy)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff{}"])
def test_unreadable_config_is_refused(base_copy, content):
    (base_copy / "config.json").unlink()
    if content:
        (base_copy / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        StreamedModel(base_copy)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"\xff{}"]
)
def test_unreadable_index_is_refused(base_copy, content):
    (base_copy / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=INDEX):
        CheckpointReader(base_copy)


@pytest.mark.parametrize(
    "change",
    [{"intermediate_size": 128}, {"vocab_size": 98}, {"num_hidden_layers": 3}],
    ids=str,
)
def test_base_config_of_another_shape_is_refused(base_copy, windows, tmp_path, change):
    rewrite_json(base_copy / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match="tensor model"):
        quantize_checkpoint(base_copy, tmp_path / "out", windows, SCHEME, calibration(), {})
    with pytest.raises(CheckpointError, match="tensor model"):
        load_model(base_copy)


def test_digest_of_a_base_follows_its_files(base_copy, bases):
    before = CheckpointReader(bases["llama-tied-sharded"]).digest()
    assert CheckpointReader(base_copy).digest() == before
    rewrite_json(base_copy / "config.json", lambda config: config.update(rms_norm_eps=1.0))
    assert CheckpointReader(base_copy).digest() != before


def test_reports_are_stored_with_the_checkpoint(written):
    for row in json.loads((written / MANIFEST).read_text())["layers"]:
        fields = {field.name for field in dataclasses.fields(LayerReport)}
        elsewhere = {"corrected", "given_error", "unseen", "rounded"}  # where there is such a thing
        assert fields - elsewhere <= row.keys()
        assert not elsewhere & row.keys()
        assert 0 < row["error"] < 0.1
        assert row["damp_frac"] == pytest.approx(0.01)
        assert row["codes_moved"] == 0
