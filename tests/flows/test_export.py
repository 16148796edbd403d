"""Exports of a release on real services, and by hand."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import run_flow
from typer.testing import CliRunner

from dpq_core.checkpoint import exports
from dpq_core.checkpoint.exports import EXPORTS, verify
from dpq_core.recipe import parse_recipe
from flows.cli.main import app
from flows.release.release import release
from infra.registry import Registry
from infra.registry.tracking import mlflow_client, tracking_store
from infra.store import Store

FORMATS = ["compressed-tensors", "gptq"]


def exporting(recipe, formats=FORMATS, **scheme):
    scheme = recipe.scheme.model_copy(update=scheme)
    return recipe.model_copy(update={"export": formats, "scheme": scheme})


@pytest.fixture(scope="module")
def released(content, services_home):
    return run_flow(release, exporting(parse_recipe(content)))


def dpq(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_promoted_release_has_its_exports_verified(released, services_home):
    assert released.verdict.verdict == "promoted"
    assert [each.name for each in released.exports] == FORMATS
    for each in released.exports:
        assert each.wrong is None
        assert verify(each.artifact.folder) == f"{each.name} export"
    client = mlflow_client(tracking_store(services_home)[0])
    run = client.get_run(released.run_id)
    paths = {file.path for file in client.list_artifacts(released.run_id)}
    assert {"exports.json", "exports.csv", "README.md"} <= paths
    for each in released.exports:
        assert run.data.tags[f"export.{each.name}"] == each.artifact.uri


def test_the_cards_have_the_gate_table(released):
    folders = [each.artifact.folder for each in released.exports]
    metric = released.verdict.metrics["perplexity_token"]
    for folder in [*folders, Path(released.checkpoint)]:
        card = (folder / "README.md").read_text()
        assert "license: psf-2.0" in card
        assert "verdict: **promoted**" in card
        assert f"| perplexity_token | {metric.baseline:.4f} | {metric.candidate:.4f} |" in card
    assert verify(Path(released.checkpoint)) == "checkpoint"


def test_a_second_release_exports_nothing_anew(released, recipe, store):
    def made():
        return {path.name: path.stat().st_mtime_ns for path in (store / "exports").iterdir()}

    before = made()
    assert len(before) >= 2
    again = run_flow(release, exporting(recipe))
    assert made() == before
    assert [each.artifact for each in again.exports] == [each.artifact for each in released.exports]


def test_an_export_that_fails_its_verification_rejects_the_release(
    recipe, services_home, monkeypatch
):
    """Nothing may differ, says this table: the reader's arithmetic does."""
    form = EXPORTS["compressed-tensors"]
    strict = dataclasses.replace(form.arithmetic, tolerance=0.0)
    monkeypatch.setitem(
        exports.EXPORTS, "compressed-tensors", dataclasses.replace(form, arithmetic=strict)
    )
    registry = Registry(tracking_store(services_home)[0])
    before = registry.champion("flow-tests")
    result = run_flow(release, exporting(recipe, symmetric=True, rounding="nearest"))
    assert result.verdict.verdict == "rejected"
    assert len(result.verdict.reasons) == 1
    assert result.verdict.reasons[0].startswith("integrity: export compressed-tensors: logits")
    assert registry.champion("flow-tests") == before


def test_what_is_rejected_is_not_exported(recipe, store):
    strict = recipe.gates.model_copy(update={"perplexity_increase": 1e-6})
    changed = exporting(recipe).model_copy(update={"gates": strict})
    result = run_flow(release, changed)
    assert result.verdict.verdict == "rejected"
    assert result.exports == []


def test_what_a_format_cannot_hold_ends_the_run_before_it_starts(recipe_file, store):
    before = len(list((store / "layers").glob("*")))
    result = dpq("release", recipe_file, "--set", "export=[inc]")
    assert result.exit_code == 1
    assert "inc cannot hold model.layers.0.self_attn.q_proj" in result.stderr
    assert "needs fp8_max: 240" in result.stderr
    repaired = ["--set", "export=[gptq]", "--set", "repair.enabled=true"]
    result = dpq("release", recipe_file, *repaired)
    assert result.exit_code == 1
    assert "repair.candidates.w4a8-g32: gptq cannot hold" in result.stderr
    result = dpq("release", recipe_file, "--set", "export=[awq]")
    assert result.exit_code == 1
    assert "export.0" in result.stderr
    assert len(list((store / "layers").glob("*"))) == before


def test_an_export_of_an_artifact_is_an_artifact(released, store):
    """Found again where a release has made it; and nothing in the store is without a manifest."""
    (made,) = (each for each in released.exports if each.name == "gptq")
    done = dpq("export", released.checkpoint, "--format", "gptq", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["export"] == str(made.artifact.folder)
    (made.artifact.folder / "README.md").unlink()
    again = dpq("export", released.checkpoint, "--format", "gptq")
    assert again.exit_code == 0, again.stderr
    assert "verdict" not in (made.artifact.folder / "README.md").read_text()
    inside = store / "checkpoints" / "mine"
    refused = dpq("export", released.checkpoint, "--format", "gptq", "--output", inside)
    assert refused.exit_code == 1
    assert f"{inside}: in the store {store}, which has its own place" in refused.stderr
    stages = [store / "checkpoints", store / "exports"]
    folders = [folder for stage in stages for folder in stage.iterdir()]
    assert all((folder / ".artifact.json").is_file() for folder in folders)
    assert Store(store).problems(made.artifact.folder) == []


def test_export_and_verify_by_hand(released, tmp_path):
    output = tmp_path / "gptq"
    arguments = ("export", Path(released.checkpoint), "--format", "gptq", "--output", output)
    done = dpq(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["export"] == str(output)
    assert set(content["checks"].values()) == {None}
    intact = dpq("verify", output, "--json")
    assert json.loads(intact.stdout) == {
        "checkpoint": str(output),
        "kind": "gptq export",
        "intact": True,
    }
    assert dpq("verify", Path(released.checkpoint)).exit_code == 0
    again = dpq(*arguments)
    assert again.exit_code == 1
    assert "exists: remove it, or name another --output" in again.stderr
    shard = next(output.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    damaged = dpq("verify", output)
    assert damaged.exit_code == 1
    assert shard.name in damaged.stderr
    unknown = dpq("export", Path(released.checkpoint), "--format", "awq")
    assert "'awq' is no export format: there are compressed-tensors" in unknown.stderr
