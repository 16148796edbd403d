"""Codes of GPTQ, AWQ and compressed-tensors are read as somebody else packed them."""

import json
import shutil

import numpy as np
import pytest
import torch
from given_checkpoints import LAYOUTS, give, meant
from model_families import save

from dpq_core.checkpoint.native import check_checkpoint, load_model
from dpq_core.evaluation.subject import streamable
from dpq_core.model.given import GivenReader, reader_of
from dpq_core.model.plan import plan_layers
from dpq_core.model.reader import CheckpointError, CheckpointReader
from dpq_core.model.source import check_source, check_values
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe.scheme import Scheme

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
KEEP = {"method": "keep", "group_size": 32, "symmetric": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save("llama-2", tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "model")


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def planned(folder, **scheme):
    return plan_layers(StreamedModel(folder), Scheme.model_validate(KEEP | scheme))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_the_weight_that_they_mean(folder, monkeypatch, layout, symmetric):
    monkeypatch.setattr("dpq_core.model.given._PIECE", 16 * 64)  # rows of several pieces
    given = give(folder, layout, symmetric=symmetric)
    check_source(folder, keeps=True)
    check_values(folder)
    reader = reader_of(folder)
    assert isinstance(reader, GivenReader)
    for linear, (codes, zeros, scales) in given.items():
        found = reader.codes(linear, 32)
        assert (found.codes.numpy() == codes).all()
        assert (found.zero_point.numpy() == zeros).all()
        assert (found.scale.numpy() == scales.astype(np.float32)).all()
        exact = torch.from_numpy(meant(codes, zeros, scales))
        assert torch.equal(found.decode(), exact.float())
        read = reader.tensor(f"{linear}.weight")
        assert torch.equal(read, exact.to(read.dtype))
        assert reader.shape_and_type(f"{linear}.weight")[0] == list(codes.shape)


def test_names_are_those_of_the_model(base, folder):
    give(folder, "gptq")
    reader = reader_of(folder)
    assert reader.names == CheckpointReader(base).names
    assert f"{UP}.qweight" not in reader
    assert reader.has_codes(UP)
    assert not reader.has_codes("lm_head")


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_the_weights_are_those_of_the_other_reader(folder, layout):
    """`dpq evaluate` reads GPTQ's files by themselves."""
    give(folder, layout, symmetric=False)
    other = dict(load_model(folder).named_parameters())
    reader = reader_of(folder)
    for name in (UP, DOWN):
        assert torch.equal(other[f"{name}.weight"], reader.tensor(f"{name}.weight"))


def test_awq_is_measured_as_the_model_that_it_means(folder):
    given = give(folder, "awq", symmetric=False)
    check_checkpoint(folder)
    parameters = dict(load_model(folder).named_parameters())
    for name, each in given.items():
        weight = parameters[f"{name}.weight"]
        assert torch.equal(weight, torch.from_numpy(meant(*each)).to(weight.dtype))


def test_what_a_release_is_judged_against_is_streamed(folder):
    give(folder, "awq")
    assert streamable(folder)
    change_config(folder, quant_method="gptq")
    assert streamable(folder, source=True)
    assert not streamable(folder)


def test_biases_of_zeros_are_autogptqs(folder):
    def add(tensors):
        tensors[f"{UP}.bias"] = torch.zeros(96)

    give(folder, "gptq", change=add)
    check_source(folder, keeps=True)


def test_a_bias_that_no_parameter_takes_is_refused(folder):
    def add(tensors):
        tensors[f"{UP}.bias"] = torch.ones(96)

    give(folder, "gptq", change=add)
    with pytest.raises(CheckpointError, match=rf"no parameter of the model takes {UP}\.bias"):
        check_source(folder, keeps=True)


def test_codes_are_not_quantized_again(folder):
    give(folder, "gptq")
    with pytest.raises(CheckpointError, match=r"scheme\.method: keep takes its codes as they are"):
        check_source(folder)


def test_there_is_nothing_to_keep_in_16_bits(folder):
    with pytest.raises(CheckpointError, match=r"keep, and no codes to keep .* choose another"):
        check_source(folder, keeps=True)
    with pytest.raises(CheckpointError, match="method is keep, and no layer has codes"):
        planned(folder)


@pytest.mark.parametrize(
    ("layout", "setting", "value"),
    [
        ("gptq", "bits", 8),
        ("gptq", "checkpoint_format", "marlin"),
        ("gptq", "group_size", 0),
        ("gptq", "quant_method", "exl2"),
        ("awq", "version", "gemv"),
        ("compressed-tensors", "format", "int-quantized"),
        ("compressed-tensors", "transform_config", {"u": 1}),
        ("compressed-tensors", "kv_cache_scheme", {"num_bits": 8}),
        ("compressed-tensors", "config_groups", {}),
    ],
)
def test_what_is_not_read_is_named(folder, layout, setting, value):
    give(folder, layout)
    change_config(folder, **{setting: value})
    with pytest.raises(CheckpointError, match=r"no codes to keep are found: \S+ is .*GPTQ and AWQ"):
        check_source(folder, keeps=True)


@pytest.mark.parametrize("setting", ["weights", "input_activations"])
def test_of_compressed_tensors_int4_weights_alone(folder, setting):
    give(folder, "compressed-tensors")
    group = {"weights": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}}
    group[setting] = {"type": "float", "num_bits": 8}
    change_config(folder, config_groups={"group_0": group})
    with pytest.raises(CheckpointError, match=f"{setting} is"):
        check_source(folder, keeps=True)


def shorter(tensors):
    tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"][:1]


def of_integers(tensors):
    tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"].int()


def without_zeros(tensors):
    del tensors[f"{UP}.qzeros"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shorter, rf"{UP}\.scales is \[1, 96\], but 4 bits in groups of 32 ask for \[2, 96\]"),
        (of_integers, rf"{UP}\.scales is I32, expected floats"),
        (without_zeros, rf"{UP}\.qzeros is missing"),
    ],
)
def test_what_does_not_belong_together_is_refused(folder, damage, said):
    give(folder, "gptq", change=damage)
    with pytest.raises(CheckpointError, match=said):
        check_source(folder, keeps=True)


def ordered(tensors):
    """As `desc_act` leaves a layer: columns of one group anywhere."""
    groups = torch.arange(64, dtype=torch.int32) // 32
    tensors[f"{UP}.g_idx"] = groups[torch.randperm(64, generator=torch.Generator().manual_seed(0))]


def beyond(tensors):
    tensors[f"{UP}.g_idx"] = torch.arange(64, dtype=torch.int32)


def test_ordered_columns_are_read_and_not_kept(folder):
    def change(tensors):
        ordered(tensors)

    given = give(folder, "gptq", change=change)
    codes, zeros, scales = given[UP]
    reader = reader_of(folder)
    group = reader._read(f"{UP}.weight")["g_idx"].numpy()
    exact = (codes.astype(np.float64) - zeros[:, group]) * scales.astype(np.float64)[:, group]
    weight = reader.tensor(f"{UP}.weight")
    assert torch.equal(weight, torch.from_numpy(exact).to(weight.dtype))
    with pytest.raises(CheckpointError, match=rf"not side by side \(desc_act\): {UP}: change"):
        planned(folder)


def test_a_group_that_is_not_there_is_refused(folder):
    give(folder, "gptq", change=beyond)
    with pytest.raises(CheckpointError, match=rf"{UP}\.g_idx points outside of 2 groups"):
        planned(folder)


def test_all_layers_that_do_not_fit_are_named_at_once(folder):
    def change(tensors):
        ordered(tensors)
        tensors[f"{DOWN}.qzeros"][:] = 0

    give(folder, "gptq", change=change)
    with pytest.raises(CheckpointError) as refused:
        planned(folder)
    said = str(refused.value)
    assert f"(desc_act): {UP};" in said
    assert f"zero points other than 8, and scheme.symmetric is true: {DOWN}:" in said
    assert "the choice w8a8 or bf16" in said
    choices = {UP: "w8a8", DOWN: "bf16"}
    plan = plan_layers(StreamedModel(folder), Scheme.model_validate(KEEP), choices)
    assert [each.scheme.keeps for each in plan.layers if each.name in choices] == [False, False]


def test_larger_groups_are_split_and_smaller_ones_refused(folder):
    given = give(folder, "gptq", group_size=32)
    found = reader_of(folder).codes(UP, 16)
    assert torch.equal(found.decode(), torch.from_numpy(meant(*given[UP])).float())
    assert found.scale.shape == (96, 4)
    assert planned(folder, group_size=16)
    with pytest.raises(
        CheckpointError, match=r"of 32 columns are given, and scheme\.group_size is 64"
    ):
        planned(folder, group_size=64)


def test_one_group_of_all_columns(folder):
    def change(tensors):
        for name in [n for n in tensors if n.endswith(("scales", "qzeros"))]:
            tensors[name] = tensors[name][:1]
        for name in [n for n in tensors if n.endswith("g_idx")]:
            tensors[name] = torch.zeros_like(tensors[name])

    give(folder, "gptq", change=change)
    change_config(folder, group_size=-1)
    assert len(planned(folder).layers) == 14
    assert (reader_of(folder).codes(UP, 32).scale.diff(dim=1) == 0).all()


def test_a_layer_that_was_left_in_16_bits_stays(folder):
    def change(tensors):
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{UP}.{part}"]
        tensors[f"{UP}.weight"] = torch.ones(96, 64, dtype=torch.bfloat16)

    give(folder, "gptq", change=change)
    plan = planned(folder)
    assert plan.skipped[UP] == "16 bits in the given checkpoint"
    assert UP not in {layer.name for layer in plan.layers}


def test_a_negative_scale_has_no_place_on_the_e4m3_grid(folder):
    def change(tensors):
        tensors[f"{UP}.scales"][0, 0] *= -1

    give(folder, "gptq", change=change)
    assert planned(folder)
    with pytest.raises(CheckpointError, match=f"a negative scale, .*: {UP}"):
        planned(folder, preset="hopper-vllm", method="keep", group_size=32)


def test_auto_round_writes_the_same_layouts(folder):
    given = give(folder, "gptq")
    change_config(folder, quant_method="auto-round", packing_format="auto_round:auto_gptq")
    assert (reader_of(folder).codes(UP, 32).codes.numpy() == given[UP][0]).all()
