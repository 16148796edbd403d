"""Bad input ends in exit code 1 and one line that says what and where, before any long work."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def model(quickstart_model, tmp_path):
    return shutil.copytree(quickstart_model, tmp_path / "model")


def truncate(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def plant_nan(model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def unknown_family(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("scheme.group_sizes=128", "scheme.group_sizes"),
        ("scheme.group_size=0", "scheme.group_size"),
        ("scheme.group_size=4096", "group_size 4096"),
        ("model.id=./no/such/folder", "./no/such/folder does not exist"),
        ("model.id=nobody/no-such-model", "nobody/no-such-model"),
        ("execution.device=cuda:9", "cuda:9"),
        ("evaluation.suites=[no_such_suite]", "no_such_suite"),
        ("evaluation={suites: [piqa], data_mirror: /no/such/mirror}", "/no/such/mirror"),
        ("evaluation={suites: [piqa], data_mirror: 's3:///'}", "data_mirror s3:///"),
        ("calibration.dataset.text_column=body", "body"),
        ("calibration.sequence_length=100000", "100000"),
        (
            "calibration.required_tokens_per_input=4",
            "1.6 for each of the widest layer's 640 inputs",
        ),
        ("scheme.method=gptq", "gptq"),
        ("no_equals_sign", "key.path=value"),
    ],
)
def test_recipe(dpq, tmp_path, monkeypatch, setting, expected):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    store = tmp_path / "store"
    result = dpq("release", "--json", "--set", f"execution.store={store}", "--set", setting)
    assert result.exit_code == 1
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert expected in error
    assert json.loads(result.stdout)["verdict"] == "error"
    assert not (store / "statistics").exists()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "model.safetensors: truncated or damaged"),
        (plant_nan, "tensor model.layers.3.mlp.up_proj.weight has NaN"),
        (drop_tensor, "model.layers.1.mlp.down_proj.weight"),
        (unknown_family, "gpt2"),
    ],
)
def test_model(dpq, model, tmp_path, damage, expected):
    damage(model)
    store = tmp_path / "store"
    settings = ["--set", f"model.id={model}", "--set", f"execution.store={store}"]
    result = dpq("quantize", *settings)
    assert result.exit_code == 1
    assert expected in result.stderr.strip().splitlines()[-1]
    assert not (store / "statistics").exists()
