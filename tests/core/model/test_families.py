"""Every row of the model table, on small random instances of the real architectures."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from model_families import FAMILIES, IDS, MIXTURES, VOCABULARY, WITH_VISION, save
from model_families import tokenizer as byte_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from dpq_core.calibration.statistics import TokenWeights, calibrate_block
from dpq_core.checkpoint.native import (
    QuantizedCheckpoint,
    check_checkpoint,
    load_model,
    load_quantized,
)
from dpq_core.data.images import image_windows
from dpq_core.data.texts import DataError
from dpq_core.evaluation.perplexity import perplexity_token
from dpq_core.kernels import products
from dpq_core.layer.linear import W4A8Linear
from dpq_core.model.inputs import batches_of
from dpq_core.model.plan import plan_layers
from dpq_core.model.reader import CheckpointError, CheckpointReader
from dpq_core.model.source import check_source
from dpq_core.model.streaming import StreamedModel
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

SCHEME = Scheme(group_size=24, rounding="nearest")
HEAD = {"lm_head": "output head, kept in 16 bits"}


def calibration(**changes):
    return CalibrationSection(
        **{"dataset": TextDataset(path="none"), "batch_size": 2, "min_tokens_per_input": 0}
        | changes
    )


@pytest.fixture(autouse=True)
def by_libraries():
    """The models are compared, to the last bit, with transformers' own."""
    with products.by_libraries():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoint folder of each family."""
    return {name: save(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(scope="module")
def windows():
    return torch.randint(256, (4, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images of several sizes with captions, as `datasets` reads it."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(2)
    lines = []
    for number, (width, height) in enumerate([(56, 56), (112, 56), (60, 84), (90, 90)] * 2):
        pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        text = f"picture {number}, {width} by {height}"
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def with_images(pictures, **changes):
    dataset = TextDataset(path="imagefolder", data_files=f"{pictures}/**")
    values = {"dataset": dataset, "image_column": "image", "samples": 4, "sequence_length": 100}
    return calibration(**values | changes)


@pytest.fixture(scope="module")
def image_inputs(folders, pictures):
    """Windows of images and texts for the vision models, by family."""
    return {
        name: image_windows(with_images(pictures), byte_tokenizer(), folders[name])
        for name in WITH_VISION
    }


def quantized(name, folders, destination, inputs, **changes):
    section = calibration(**changes)
    manifest = quantize_checkpoint(folders[name], destination, inputs, SCHEME, section, {})
    QuantizedCheckpoint(destination).verify()
    return manifest


@torch.no_grad()
def logits_of(model, inputs):
    return torch.cat([model(**each).logits.flatten() for each in inputs])


def original(name, folder):
    """transformers' own model, experts fused; its plain loop over them is bit-reproducible."""
    eager = {"experts_implementation": "eager"} if name in MIXTURES else {}
    model_class = FAMILIES[name].model_class
    return model_class.from_pretrained(folder, dtype=torch.bfloat16, **eager).eval()


# The streamed model is the model


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_blocks_give_the_models_logits(folders, windows, name):
    found = streamed_logits(StreamedModel(folders[name]), batches_of(windows, 4))
    expected = logits_of(original(name, folders[name]), batches_of(windows, 4))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", WITH_VISION)
def test_streamed_blocks_with_images_give_the_models_logits(folders, image_inputs, name):
    stream = StreamedModel(folders[name], images=True)
    found = streamed_logits(stream, image_inputs[name])
    assert torch.equal(found, logits_of(original(name, folders[name]), image_inputs[name]))
    assert not any(True for _ in stream.model.parameters())  # and nothing stays in memory


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_whole_it_is_the_model(folders, windows, name):
    inputs = batches_of(windows, 4)
    expected = logits_of(original(name, folders[name]), inputs)
    assert torch.equal(logits_of(load_model(folders[name]), inputs), expected)


@torch.no_grad()
def streamed_logits(stream, inputs):
    batches = stream.begin(inputs)
    for index in range(stream.block_count):
        with stream.block(index):
            stream.advance(batches)
    return torch.cat([stream.logits(batch.hidden).flatten() for batch in batches])


# Every linear is found, or named as skipped


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_is_planned_or_skipped_with_its_reason(folders, name, images):
    family = FAMILIES[name]
    if images and not family.vision:
        with pytest.raises(CheckpointError, match=r"no vision tower.*calibration\.image_column"):
            StreamedModel(folders[name], images=True)
        return
    plan = plan_layers(StreamedModel(folders[name], images=images), SCHEME)
    planned = {layer.name for layer in plan.layers}
    assert planned == family.language | (family.vision if images else set())
    expected = HEAD | {n: f"{kind}, no linear layer" for n, kind in family.matrices.items()}
    if not images:
        reason = "calibration without images never reaches it (calibration.image_column)"
        expected |= dict.fromkeys(family.vision, reason)
    assert plan.skipped == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_hessians_are_shared_where_inputs_are(folders, windows, image_inputs, name):
    """Statistics of every linear on its own: those of the group's first are each member's."""
    images = name in WITH_VISION
    stream = StreamedModel(folders[name], images=images)
    batches = stream.begin(image_inputs[name] if images else batches_of(windows, 2))
    planned = {layer.name: layer.statistics for layer in plan_layers(stream, SCHEME).layers}
    assert len(set(planned.values())) < len(planned)
    for index in range(stream.block_count):
        seen = {}
        with stream.block(index) as block:
            path = stream.block_name(index)
            for full_name in stream.linears(index):
                watch(block.get_submodule(full_name.removeprefix(f"{path}.")), full_name, seen)
            for batch in batches:
                stream.forward(batch)
        statistics = calibrate_block(
            stream, index, batches, None, TokenWeights(False, 0), advance=True
        )
        assert seen.keys() <= set(stream.linears(index))
        for full_name, inputs in seen.items():
            shared = statistics[planned[full_name]]
            assert shared.tokens == sum(len(x) for x in inputs)
            own = sum(2 * x.T @ x for x in inputs)
            torch.testing.assert_close(shared.hessian_sum, own, rtol=1e-4, atol=1e-3)


def watch(linear, name, seen):
    def see(_, arguments):
        x = arguments[0].float()
        seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))

    linear.register_forward_pre_hook(see)


# Quantize, write, load


@pytest.mark.parametrize(
    ("name", "propagation"),
    [(name, "original") for name in FAMILIES]
    + [(name, "quantized") for name in ("qwen3-moe", "qwen2.5-vl")]
    + [(name, "groups") for name in ("qwen3-moe", "mixtral", "gemma3", "qwen2.5-vl")],
)
def test_loaded_checkpoint_gives_the_fake_quantized_models_logits(
    folders, windows, image_inputs, tmp_path, name, propagation
):
    images = name in WITH_VISION
    inputs = image_inputs[name] if images else batches_of(windows, 2)
    column = "image" if images else None
    out = tmp_path / "out"
    fed = {"propagation": propagation, "correction": 0.5 if propagation == "groups" else 0}
    manifest = quantized(name, folders, out, inputs, image_column=column, **fed)
    assert {row["name"] for row in manifest["layers"]} == FAMILIES[name].language | (
        FAMILIES[name].vision
    )
    expected = logits_of(by_hand(folders[name], out), inputs)
    assert torch.equal(logits_of(load_quantized(out), inputs), expected)
    stream = StreamedModel(out, images=images)
    assert not torch.equal(expected, logits_of(load_model(folders[name]), inputs))
    assert stream.block_count == len(FAMILIES[name].linears) + (3 if images else 0)
    corrected = [row.get("corrected", 0) > 0 for row in manifest["layers"] if row["error"]]
    assert corrected == [propagation == "groups"] * len(corrected)


def by_hand(base, out):
    """The 16-bit model with its linears replaced, one by one, by those on disk."""
    model, checkpoint = load_model(base), QuantizedCheckpoint(out)
    for name in checkpoint.shapes:
        linear = model.get_submodule(name)
        model.set_submodule(name, W4A8Linear(checkpoint.layer(name), linear.bias))
    return model


@pytest.mark.parametrize("name", WITH_VISION)
def test_text_alone_reaches_every_language_layer(folders, windows, tmp_path, name):
    manifest = quantized(name, folders, tmp_path / "out", windows)
    assert {row["name"] for row in manifest["layers"]} == FAMILIES[name].language
    assert FAMILIES[name].vision <= manifest["skipped"].keys()
    scores = perplexity_token(load_quantized(tmp_path / "out"), windows, 2)
    assert 1 < scores.value < 10 * VOCABULARY
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


# Mixtures of experts


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_saw_too_few_tokens_stay_in_16_bits_by_name(folders, windows, tmp_path, name):
    """A router that seldom chooses experts 2 and 3."""
    base, out = shutil.copytree(folders[name], tmp_path / "base"), tmp_path / "out"
    tensors = load_file(base / "model.safetensors")
    router = next(key for key in sorted(tensors, reverse=True) if key.endswith(".gate.weight"))
    tensors[router][3] *= 0.01
    tensors[router][2] *= 0.1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    section = calibration(min_tokens_per_input=0.6)
    manifest = quantize_checkpoint(base, out, windows[:2], SCHEME, section, {})
    rows = {row["name"]: row for row in manifest["layers"]}
    kept = {row["name"] for row in rows.values() if row["tokens"] < 0.6 * row["shape"][1]}
    assert kept
    assert kept < {layer for layer in rows if "mlp.experts." in layer}
    for layer, row in rows.items():
        assert (layer in manifest["skipped"]) == (layer in kept)
        assert (row["scheme"].get("method") == "none") == (layer in kept)
        if layer in kept:
            assert manifest["skipped"][layer] == (
                f"saw {row['tokens']} calibration tokens for {row['shape'][1]} inputs, and "
                "calibration.min_tokens_per_input is 0.6"
            )
            stored = CheckpointReader(out).tensor(f"{layer}.weight")
            assert torch.equal(stored, CheckpointReader(base).tensor(f"{layer}.weight"))
    QuantizedCheckpoint(out).verify()
    inputs = batches_of(windows, 2)
    assert torch.equal(
        logits_of(load_quantized(out), inputs), logits_of(by_hand(base, out), inputs)
    )


def test_an_expert_without_any_token_stays(folders, windows, tmp_path):
    base = shutil.copytree(folders["mixtral"], tmp_path / "base")
    manifest = quantize_checkpoint(
        base, tmp_path / "out", windows[:1, :2], SCHEME, calibration(), {}
    )
    unseen = [row["name"] for row in manifest["layers"] if row["tokens"] == 0]
    assert unseen  # two tokens, two experts each, of four
    assert manifest["skipped"][unseen[0]].startswith("saw 0 calibration tokens")


# Images


def test_windows_hold_whole_images_and_are_no_longer_than_asked(folders, pictures, image_inputs):
    for name in WITH_VISION:
        for each in image_inputs[name]:
            length, images = each["input_ids"].shape[1], each["image_grid_thw"]
            assert length <= 100
            features = int((images.prod(1) // 4).sum())
            assert int((each["input_ids"] == IDS["<|image_pad|>"]).sum()) == features
            assert int(each["mm_token_type_ids"].sum()) == features
            assert len(each["pixel_values"]) == 4 * features
        assert max(len(each["image_grid_thw"]) for each in image_inputs[name]) > 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sequence_length": 8}, r"row \d: its image takes \d+ tokens.*sequence_length 8"),
        ({"image_column": "photo"}, "no column 'photo'"),
        ({"image_column": "text"}, r"row 0: str .*not an image"),
    ],
)
def test_images_that_cannot_be_used(folders, pictures, changes, expected):
    with pytest.raises(DataError, match=expected):
        image_windows(with_images(pictures, **changes), byte_tokenizer(), folders["qwen2.5-vl"])


def test_no_image_processor(folders, pictures, tmp_path):
    base = shutil.copytree(folders["qwen2-vl"], tmp_path / "base")
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no usable image processor"):
        image_windows(with_images(pictures), byte_tokenizer(), base)


# What is refused


def test_a_linear_that_a_towers_row_lacks(folders, monkeypatch):
    from dpq_core.model import families

    row = families.FAMILIES["qwen2_vl"]
    short = dataclasses.replace(row.vision, block_groups=row.vision.block_groups[:-1])
    changed = dataclasses.replace(row, vision=short)
    monkeypatch.setitem(families.FAMILIES, "qwen2_vl", changed)
    stream = StreamedModel(folders["qwen2-vl"], images=True)
    with pytest.raises(CheckpointError, match=re.escape("model.visual.blocks.0.mlp.fc2")):
        plan_layers(stream, SCHEME)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What checkpoints come in


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama-3.1", torch.bfloat16),
        ("llama-3.1", torch.float16),
        ("mixtral", torch.float16),
        ("llama-3.1", torch.float32),
        ("qwen2.5-vl", torch.float32),
    ],
)
def test_types_sharded(windows, tmp_path, name, dtype):
    base = save(name, tmp_path / "base", dtype, max_shard_size="100KB")
    assert (base / "model.safetensors.index.json").is_file()
    check_source(base)
    expected = torch.bfloat16 if dtype == torch.float32 else dtype
    assert StreamedModel(base).dtype == expected
    out = tmp_path / "out"
    quantized(name, {name: base}, out, windows)
    model = load_quantized(out)
    assert model.dtype == expected
    inputs = batches_of(windows, 2)
    assert torch.isfinite(logits_of(model, inputs)).all()
    assert torch.equal(logits_of(model, inputs), logits_of(by_hand(base, out), inputs))


def test_hub_names_are_the_models_names(folders):
    stored = load_file(folders["qwen2.5-vl"] / "model.safetensors")
    assert "visual.blocks.0.attn.qkv.weight" in stored
    assert "model.layers.0.self_attn.q_proj.weight" in stored
    reader = CheckpointReader(folders["qwen2.5-vl"])
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(reader.tensor(name), stored["model.layers.0.self_attn.q_proj.weight"])
    assert "model.visual.blocks.0.attn.qkv.weight" in reader
    with pytest.raises(CheckpointError, match="missing"):
        reader.tensor("visual.blocks.0.attn.qkv.weight")


OWN_CODE = """
from transformers import LlamaForCausalLM

class DoubledLlama(LlamaForCausalLM):
    def forward(self, *arguments, **named):
        output = super().forward(*arguments, **named)
        output.logits = output.logits * 2
        return output
"""


@pytest.fixture
def with_code(folders, tmp_path, monkeypatch):
    """A Llama whose own code doubles the logits."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = shutil.copytree(folders["llama-2"], tmp_path / "base")
    (base / "modeling_doubled.py").write_text(OWN_CODE)
    auto = {"AutoModelForCausalLM": "modeling_doubled.DoubledLlama"}
    change_config(base, auto_map=auto)
    return base


def test_a_checkpoints_own_code_runs_only_where_it_is_trusted(with_code, windows, tmp_path):
    inputs = batches_of(windows, 4)
    plain = logits_of(load_model(with_code), inputs)
    doubled = logits_of(load_model(with_code, trust_remote_code=True), inputs)
    assert torch.equal(doubled, 2 * plain)
    stream = StreamedModel(with_code, trust_remote_code=True)
    assert torch.equal(streamed_logits(stream, inputs), doubled)


def test_own_code_belongs_to_the_model(with_code, windows, tmp_path):
    before = CheckpointReader(with_code).digest()
    quantize_checkpoint(with_code, tmp_path / "out", windows, SCHEME, calibration(), {})
    assert (tmp_path / "out" / "modeling_doubled.py").read_text() == OWN_CODE
    inputs = batches_of(windows, 4)
    plain = logits_of(load_quantized(tmp_path / "out"), inputs)
    trusted = load_quantized(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits_of(trusted, inputs), 2 * plain)
    (with_code / "modeling_doubled.py").write_text(OWN_CODE.replace("* 2", "* 3"))
    assert CheckpointReader(with_code).digest() != before


def test_an_architecture_of_its_own_code_is_refused_unless_trusted(with_code):
    change_config(
        with_code, model_type="novel", auto_map={"AutoConfig": "modeling_doubled.NovelConfig"}
    )
    with pytest.raises(CheckpointError, match=r"'novel'.*model\.trust_remote_code: true"):
        check_checkpoint(with_code)
