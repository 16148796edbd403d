"""A release whose keys and values are kept in FP8: the same bytes however it is run, and shown."""

import json
from pathlib import Path

import pytest
from conftest import run_flow
from test_same_bytes import contents, in_store, plainly, propagating
from typer.testing import CliRunner

from dpq_core.checkpoint.native import QuantizedCheckpoint
from flows.cli.main import app
from flows.quantize import quantize
from flows.release.release import release
from infra.registry.tracking import mlflow_client, tracking_store

HEADS, SIZE, LAYERS = 2, 64, 5  # of the quickstart's model


def with_cache(recipe, **fields):
    scheme = recipe.scheme.model_copy(update={"kv_cache": "fp8", **fields})
    return recipe.model_copy(update={"scheme": scheme})


@pytest.mark.parametrize(("how", "shards"), [("original", 2), ("groups", 1), ("groups", 2)])
def test_plain_python_and_prefect(recipe, how, shards, tmp_path):
    """Sixteen windows, two leaves."""
    section = recipe.calibration.model_copy(update={"samples": 32, "sequence_length": 64})
    recipe = with_cache(propagating(recipe.model_copy(update={"calibration": section}), how))
    recipe = in_store(recipe, tmp_path / "store", shards=shards, blocks_per_task=1)
    made = run_flow(quantize, recipe)
    assert not any(made.integrity.values())
    plainly(recipe, tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(made.checkpoint.folder)


def test_nothing_is_made_anew_but_what_comes_of_the_cache(recipe, tmp_path):
    """The statistics beside which it is looked at, and the layer that reads these."""
    store = tmp_path / "store"

    def layers(each):
        return run_flow(quantize, in_store(each, store)).layers

    plain, cached = layers(recipe), layers(with_cache(recipe))
    changed = {name for name in plain if plain[name] != cached[name]}
    assert {name.partition("self_attn.")[2] for name in changed} <= {"o_proj"}
    by_head = layers(with_cache(recipe, kv_cache_scale="head"))
    assert by_head == cached


def test_a_release_shows_what_it_was_judged_with(recipe, services_home):
    recipe = with_cache(recipe, symmetric=True)
    recipe = recipe.model_copy(update={"export": ["compressed-tensors"]})
    released = run_flow(release, recipe)
    assert released.verdict.verdict == "promoted"
    (export,) = released.exports
    assert export.wrong is None
    found = QuantizedCheckpoint(Path(released.checkpoint))
    assert len(found.cache) == LAYERS
    client = mlflow_client(tracking_store(services_home)[0])
    run = client.get_run(released.run_id)
    taken = 2 * LAYERS * HEADS * SIZE
    assert run.data.metrics["cache_bytes_per_token"] == taken
    assert run.data.params["scheme.kv_cache"] == "fp8"
    said = f"FP8 (E4M3), a scale a layer: {taken:,} bytes a token, of {2 * taken:,} in 16 bits"
    for folder in (export.artifact.folder, found.folder):
        assert f"| KV cache | {said} |" in (folder / "README.md").read_text()
    report = client.download_artifacts(released.run_id, "report.html")
    assert said in Path(report).read_text()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["export=[gptq]"], "gptq cannot hold the scales of an FP8 cache"),
        (["scheme.kv_cache_scale=head", "scheme.kv_cache=none"], "kv_cache is 'none'"),
    ],
)
def test_what_cannot_be_carried_ends_the_run_before_it_starts(
    recipe_file, tmp_path, settings, expected
):
    store = tmp_path / "store"
    given = [f"execution.store={store}", "scheme.kv_cache=fp8", *settings]
    arguments = [part for setting in given for part in ("--set", setting)]
    result = CliRunner().invoke(app, ["release", str(recipe_file), "--json", *arguments])
    assert result.exit_code == 1
    assert expected in result.stderr.strip().splitlines()[-1]
    assert json.loads(result.stdout)["verdict"] == "error"
    assert not (store / "statistics").exists()
