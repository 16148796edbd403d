"""A release of a model whose architecture is the checkpoint's own code."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_flow
from transformers import dynamic_module_utils

from dpq_core.recipe import parse_recipe
from flows.release.release import release

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class NovelConfig(LlamaConfig):
    model_type = "novel"

class NovelForCausalLM(LlamaForCausalLM):
    config_class = NovelConfig
"""
AUTO = {
    "AutoConfig": "modeling_novel.NovelConfig",
    "AutoModelForCausalLM": "modeling_novel.NovelForCausalLM",
}


@pytest.fixture
def novel(quickstart_model, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(quickstart_model, tmp_path / "novel"))
    (folder / "modeling_novel.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    changed = {"model_type": "novel", "architectures": ["NovelForCausalLM"], "auto_map": AUTO}
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


def test_it_has_its_card_and_report(novel, content, services_home):
    model = {"id": str(novel), "trust_remote_code": True}
    registry = {"name": "own-code-tests"}
    found = run_flow(release, parse_recipe({**content, "model": model, "registry": registry}))
    assert found.verdict.verdict == "promoted", found.verdict.reasons
    assert found.report.error is None
    card = Path(found.checkpoint, "README.md").read_text("utf-8")
    assert "| embedding and head, tied | 132,608 |" in card
