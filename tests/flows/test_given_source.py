"""A release of a model that is published in 4 bits: its codes are kept, and it is the baseline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_flow
from given_checkpoints import give

from dpq_core.checkpoint.native import QuantizedCheckpoint
from dpq_core.recipe import parse_recipe
from flows.release.release import release
from infra.store import Store

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def given(quickstart_model, tmp_path):
    def make(layout, change=lambda tensors: None, **about):
        folder = shutil.copytree(quickstart_model, tmp_path / "given")
        return folder, give(folder, layout, change=change, **about)

    return make


def test_release(content, services_home, given):
    folder, codes = given("awq", group_size=64, symmetric=False)
    scheme = {"method": "keep", "group_size": 64, "scale_search": "hessian"}
    changes = {"scheme": scheme, "export": ["gptq"], "registry": {"name": "awq-source"}}
    result = run_flow(release, parse_recipe({**content, "model": {"id": str(folder)}, **changes}))
    assert result.verdict.verdict == "promoted"
    assert result.manifest["base_model"]["stored_as"] == "'awq'"
    checkpoint = QuantizedCheckpoint(Path(result.checkpoint))
    for name, (k, z, _) in codes.items():
        weight = checkpoint.layer(name).weight
        assert (weight.codes.numpy() == k).all()
        assert (weight.grid.zero_point.numpy() == z).all()
    assert 0 < result.verdict.metrics["divergence"].candidate < 0.1
    (export,) = result.exports
    folder = Store(content["execution"]["store"]).open(export.artifact)
    card = (folder / "README.md").read_text()
    assert f"| given in | 'awq'; its codes are kept in {len(codes)} layers" in card


def ordered(tensors):
    order = torch.randperm(len(tensors[f"{DOWN}.g_idx"]), generator=torch.Generator())
    tensors[f"{DOWN}.g_idx"] = tensors[f"{DOWN}.g_idx"][order]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "quantized already: quant_method 'gptq'"),
        (["scheme.method=keep"], "groups of 64 columns are given, and scheme.group_size is 128"),
        (["scheme.method=keep", "scheme.group_size=64"], f"(desc_act): {DOWN}:"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(dpq, tmp_path, given, settings, said):
    folder, _ = given("gptq", ordered, group_size=64)
    store = tmp_path / "store"
    chosen = [f"model.id={folder}", f"execution.store={store}", *settings]
    result = dpq("release", "--json", *(part for each in chosen for part in ("--set", each)))
    assert result.exit_code == 1
    assert said in result.stderr.strip().splitlines()[-1]
    assert json.loads(result.stdout)["verdict"] == "error"
    assert not (store / "statistics").exists()


def test_there_is_nothing_to_keep_in_16_bits(dpq, tmp_path):
    result = dpq("quantize", "--set", "scheme.method=keep")
    assert result.exit_code == 1
    assert "scheme.method is keep, and no codes to keep are found" in result.stderr
