"""Bad input ends in exit code 1 and one line that says what and where, before any long work."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.cli.main import app


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


def whole_numbers(model):
    """As bitsandbytes stores weights, and says so."""
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        largest = tensors[name].float().abs().amax(1)
        tensors[name.removesuffix("weight") + "SCB"] = largest
        codes = (tensors[name].float() / largest[:, None] * 127).round()
        tensors[name] = codes.to(torch.int8)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    change_config(model, quantization_config={"quant_method": "bitsandbytes"})


def left_over(model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale"] = torch.ones(1)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def short_context(model):
    change_config(model, max_position_embeddings=100)


def short_vocabulary(model):
    """Without the rows of the last bytes: `é` and its like are none of its tokens."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    change_config(model, vocab_size=100)


def change_config(model, **values):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


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
        (whole_numbers, "quantized already: quant_method 'bitsandbytes'"),
        (left_over, "no parameter of the model takes model.layers.1.mlp.down_proj.weight_scale"),
        (short_context, "calibration.sequence_length is 128, and the model's context is 100"),
        (short_vocabulary, "the tokenizer is another model's"),
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


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (left_over, "no parameter of the model takes model.layers.1.mlp.down_proj.weight_scale"),
        (short_context, "evaluation.perplexity.sequence_length is 128, and the model's context is"),
        (short_vocabulary, "the tokenizer is another model's"),
    ],
)
def test_model_that_is_only_measured(recipe_file, model, tmp_path, damage, expected):
    damage(model)
    settings = ["--recipe", str(recipe_file), "--set", f"execution.store={tmp_path / 'store'}"]
    result = CliRunner().invoke(app, ["evaluate", str(model), *settings])
    assert result.exit_code == 1
    assert expected in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "store" / "scores").exists()


@pytest.mark.parametrize("command", ["release", "compare", "bench"])
def test_every_command_that_reads_a_model_looks_at_it(dpq, model, tmp_path, command):
    left_over(model)
    settings = ["--set", f"model.id={model}", "--set", f"execution.store={tmp_path / 'store'}"]
    result = dpq(command, *settings)
    assert result.exit_code == 1
    expected = "no parameter of the model takes model.layers.1.mlp.down_proj.weight_scale"
    assert expected in result.stderr.strip().splitlines()[-1]


def test_a_source_is_looked_at_though_it_was_measured(dpq, model, tmp_path, recipe_file):
    """What may be measured may still be no source: GPTQ's checkpoints, for one."""
    store = ["--set", f"execution.store={tmp_path / 'store'}"]
    measured = ["evaluate", str(model), "--recipe", str(recipe_file), *store]
    assert CliRunner().invoke(app, measured).exit_code == 0
    (model / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    result = dpq("quantize", "--set", f"model.id={model}", *store)
    assert result.exit_code == 1
    assert "quant_method 'gptq'" in result.stderr.strip().splitlines()[-1]
