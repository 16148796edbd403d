"""A quantized output head in exports, embeddings refused, and whose the bytes are."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dpq_core.checkpoint.bytes_by_part import TIED, bytes_by_part
from dpq_core.checkpoint.exports import (
    check_exportable,
    export_checkpoint,
    failures,
    planned_targets,
)
from dpq_core.checkpoint.exports.card import model_card, shown_parts
from dpq_core.checkpoint.exports.format import ExportError
from dpq_core.checkpoint.native import QuantizedCheckpoint, load_model
from dpq_core.model.plan import plan_layers
from dpq_core.model.reader import CheckpointError, CheckpointReader
from dpq_core.model.streaming import StreamedModel
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
SECTION = CalibrationSection(dataset=TextDataset(path="none"), min_tokens_per_input=0)
SCHEME = Scheme(group_size=32, symmetric=True, rounding="nearest")
GAUDI = Scheme(preset="gaudi-inc", group_size=32, symmetric=True)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {}
    for kind in ("tied", "untied"):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=200,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.15,
            tie_word_embeddings=kind == "tied",
        )
        folders[kind] = tmp_path_factory.mktemp(kind)
        model = AutoModelForCausalLM.from_config(config).bfloat16()
        model.save_pretrained(folders[kind])
    return folders


def made(base, folder, choices, scheme=SCHEME):
    windows = torch.randint(200, (4, 32), generator=torch.Generator().manual_seed(0))
    quantize_checkpoint(base, folder, windows, scheme, SECTION, {}, choices)
    return folder


@pytest.mark.parametrize(
    ("name", "choice", "scheme"),
    [
        ("compressed-tensors", "w4a8", SCHEME),
        ("compressed-tensors", "w8a8", SCHEME),
        ("compressed-tensors", "w8a16", SCHEME),
        ("compressed-tensors", "bf16", SCHEME),
        ("gptq", "w4a8", SCHEME),
        ("gptq", "bf16", SCHEME),
        ("inc", "bf16", GAUDI),
    ],
)
def test_another_reader_gives_the_head_s_logits(bases, tmp_path, name, choice, scheme):
    """To the last bit those of the native codes in its arithmetic (`checks`)."""
    source = made(bases["untied"], tmp_path / "native", {HEAD: choice}, scheme)
    (tmp_path / "export").mkdir()
    manifest = export_checkpoint(source, tmp_path / "export", name)
    assert not failures(manifest)
    config = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    if name == "compressed-tensors":
        targets = [t for group in config["config_groups"].values() for t in group["targets"]]
        assert (HEAD in targets) == (choice != "bf16")
        assert (HEAD in config["ignore"]) == (choice == "bf16")
    else:
        assert config.get("lm_head", False) == (choice != "bf16")
        assert (r"-:^lm_head$" in config["dynamic"]) == (choice == "bf16")
    if name == "gptq":
        assert load_model(tmp_path / "export").lm_head.weight.isfinite().all()


def test_a_gptq_head_of_its_own_is_refused_where_it_is_said_to_be_tied(bases, tmp_path):
    source = made(bases["untied"], tmp_path / "native", {HEAD: "w4a8"})
    (tmp_path / "export").mkdir()
    export_checkpoint(source, tmp_path / "export", "gptq")
    path = tmp_path / "export" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"a head of its own, but config.json ties it"):
        load_model(tmp_path / "export")


@pytest.mark.parametrize(
    ("kind", "name", "layers", "scheme", "said"),
    [
        ("tied", "compressed-tensors", {EMBEDDING: "w8a16"}, SCHEME, "look rows up.*tied to it"),
        ("untied", "compressed-tensors", {EMBEDDING: "w8a16"}, SCHEME, "look rows up in 16 bits"),
        ("tied", "gptq", {EMBEDDING: "w4a8"}, SCHEME, "look rows up.*tied to it"),
        ("untied", "gptq", {HEAD: "w8a8"}, SCHEME, "holds 4-bit weights only"),
        ("untied", "inc", {HEAD: "w4a8"}, GAUDI, "keeps the output head in 16 bits"),
        ("tied", "inc", {EMBEDDING: "w4a8"}, GAUDI, "look rows up"),
    ],
)
def test_what_a_format_cannot_hold_is_told_before_any_work(bases, kind, name, layers, scheme, said):
    plan = plan_layers(StreamedModel(bases[kind]), scheme, layers)
    with pytest.raises(ExportError, match=said):
        check_exportable(name, planned_targets(plan, scheme, torch.bfloat16))


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("tied", {}),
        ("tied", {EMBEDDING: "w4a8"}),
        ("untied", {}),
        ("untied", {HEAD: "w8a8", EMBEDDING: "w8a16"}),
    ],
)
def test_bytes_by_part_are_those_of_the_files(bases, tmp_path, kind, choices):
    folder = made(bases[kind], tmp_path / "native", choices)
    checkpoint = QuantizedCheckpoint(folder)
    found = bytes_by_part(checkpoint)
    stored = {
        name: CheckpointReader(folder).tensor(name).nbytes for name in checkpoint.reader.names
    }
    assert sum(found.values()) == sum(stored.values())
    outside = [TIED] if kind == "tied" else ["embedding", "head"]
    assert list(found) == [*outside, "attention", "MLP", "norms and the rest"]
    for part, members in {"attention": "self_attn.", "MLP": "mlp.", outside[0]: EMBEDDING}.items():
        assert found[part] == sum(size for name, size in stored.items() if members in name)
    if kind == "untied":
        (tmp_path / "export").mkdir()
        if not choices:
            manifest = export_checkpoint(folder, tmp_path / "export", "compressed-tensors")
            reader = CheckpointReader(tmp_path / "export", as_stored=True)
            size = sum(reader.tensor(name).nbytes for name in reader.names)
            assert sum(bytes_by_part(checkpoint, manifest).values()) == size
    card = model_card(checkpoint)
    for row in shown_parts(found):
        assert f"| {row['part']} | {row['bytes']} | {row['share']} |" in card
