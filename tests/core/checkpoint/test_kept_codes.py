"""A 4-bit checkpoint of others becomes W4A8 and an export, its codes bit for bit what they were."""

import json
import shutil

import pytest
import torch
from given_checkpoints import give
from model_families import save

from dpq_core.checkpoint.exports import export_checkpoint, failures
from dpq_core.checkpoint.native import QuantizedCheckpoint, load_model
from dpq_core.model.given import GivenReader, reader_of
from dpq_core.model.given_layouts import COMPRESSED, GPTQ, GivenCodes
from dpq_core.model.reader import CheckpointError, CheckpointReader
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
KEEP = {"method": "keep", "group_size": 32}
SYMMETRIC = KEEP | {"symmetric": True, "activations": "dynamic"}
HOPPER = {"preset": "hopper-vllm", **KEEP}
ADA = {"preset": "ada-vllm", **KEEP}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {
        dtype: save("llama-2", tmp_path_factory.mktemp("base"), dtype)
        for dtype in (torch.bfloat16, torch.float16)
    }


@pytest.fixture
def given(bases, tmp_path):
    def make(layout, symmetric=True, dtype=torch.bfloat16):
        folder = shutil.copytree(bases[dtype], tmp_path / "given")
        return folder, give(folder, layout, symmetric=symmetric)

    return make


def converted(folder, destination, scheme, choices=None):
    windows = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(1))
    quantize_checkpoint(
        folder,
        destination,
        windows,
        Scheme.model_validate(scheme),
        CalibrationSection(dataset=TextDataset(path="none"), batch_size=2),
        {},
        choices,
    )
    return destination


def exported(native, folder, form):
    folder.mkdir()
    assert failures(export_checkpoint(native, folder, form)) == []
    return folder


@pytest.mark.parametrize(
    ("layout", "symmetric", "scheme", "form"),
    [
        ("gptq", True, SYMMETRIC, "gptq"),
        ("gptq", True, HOPPER, "compressed-tensors"),
        ("gptq_v2", False, KEEP, "compressed-tensors"),
        ("awq", False, KEEP, "gptq"),
        ("awq", True, ADA, "gptq"),
        ("compressed-tensors", True, ADA, "compressed-tensors"),
        ("compressed-tensors", False, KEEP, "gptq"),
    ],
)
def test_codes_stay_through_to_the_export(given, tmp_path, layout, symmetric, scheme, form):
    folder, codes = given(layout, symmetric)
    native = converted(folder, tmp_path / "native", scheme)
    checkpoint = QuantizedCheckpoint(native)
    checkpoint.verify()
    layout = GPTQ if form == "gptq" else COMPRESSED
    folder = exported(native, tmp_path / "export", form)
    offset = reader_of(folder)._given.offset if form == "gptq" else 0
    served = GivenReader(folder, GivenCodes(layout, 32, offset))
    for name, (k, z, _) in codes.items():
        weight = checkpoint.layer(name).weight
        assert (weight.codes.numpy() == k).all()
        assert (weight.grid.zero_point.numpy() == z).all()
        found = served.codes(name, 32)
        # A GPTQ file has groups whose zero point is 0 one step higher: the same values.
        higher = found.zero_point.numpy() - z
        assert not higher.any() or (form == "gptq" and set(higher[higher > 0]) == {1})
        assert (found.codes.numpy() - higher.repeat(32, 1) == k).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_ada_serves_is_the_given_model_with_other_inputs(given, tmp_path, dtype):
    """Scales of the model's own type: every tensor of the export means what it meant."""
    folder, codes = given("compressed-tensors", dtype=dtype)
    native = converted(folder, tmp_path / "native", ADA)
    served = reader_of(exported(native, tmp_path / "export", "compressed-tensors"))
    for name in codes:
        before, after = (reader.codes(name, 32) for reader in (reader_of(folder), served))
        assert torch.equal(before.decode(), after.decode())
    rows = json.loads((native / "dpq.json").read_text())["layers"]
    assert {row["given_error"] for row in rows} == {0.0}
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["input_activations"] is None


def test_the_manifest_says_how_far_each_layer_is(given, tmp_path):
    folder, codes = given("gptq")
    manifest = json.loads((converted(folder, tmp_path / "native", HOPPER) / "dpq.json").read_text())
    assert {row["name"] for row in manifest["layers"]} == codes.keys()
    assert all(0 < row["given_error"] < 0.01 for row in manifest["layers"])


def test_all_else_is_the_given_model(given, tmp_path):
    folder, codes = given("gptq")
    native = converted(folder, tmp_path / "native", SYMMETRIC, {UP: "bf16", DOWN: "w8a8"})
    before, after = reader_of(folder), CheckpointReader(native)
    linears = {f"{name}.weight" for name in codes} - {f"{UP}.weight"}
    for name in set(before.names) - linears:
        assert torch.equal(before.tensor(name), after.tensor(name))
    assert after.tensor(f"{DOWN}.weight").dtype == torch.float8_e4m3fn
    assert load_model(native) is not None


def test_settings_of_the_source_are_not_carried_over(given, tmp_path):
    """AutoGPTQ's old file: a loader of the export would take it for the export's own."""
    folder, _ = given("gptq")
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(quantization))
    native = converted(folder, tmp_path / "native", SYMMETRIC)
    assert not (native / "quantize_config.json").exists()


def test_nothing_is_written_where_codes_do_not_fit(given, tmp_path):
    folder, _ = given("awq", symmetric=False)
    with pytest.raises(CheckpointError, match="zero points other than 8"):
        converted(folder, tmp_path / "native", HOPPER)
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_the_card_says_how_it_is_served(given, tmp_path, form):
    folder, codes = given("gptq")
    native = converted(folder, tmp_path / "native", ADA)
    card = (exported(native, tmp_path / "export", form) / "README.md").read_text()
    assert "VLLM_MARLIN_INPUT_DTYPE=fp8 vllm serve" in card
    assert "W4A8-FP8, weights not rounded: Marlin on Ada and Blackwell RTX" in card
    assert f"4 bits; its codes are kept in {len(codes)} layers, whose outputs differ" in card
    plain = converted(folder, tmp_path / "plain", SYMMETRIC)
    assert (
        "VLLM_MARLIN" not in (exported(plain, tmp_path / "other", form) / "README.md").read_text()
    )
