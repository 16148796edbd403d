"""A candidate's divergence, from beside its scores to all that people read."""

import json
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import torch
from conftest import run_flow
from lxml.html import HTMLParser, document_fromstring
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from typer.testing import CliRunner

from dpq_core.evaluation.divergence import Divergence
from dpq_core.evaluation.text_divergence import (
    DIVERGENCE,
    FILE,
    load_divergence,
    save_divergence,
    text_divergence,
)
from dpq_core.recipe import parse_recipe
from dpq_core.verdict.gates import NotMeasuredError
from dpq_core.verdict.halves import ALL, JUDGING
from dpq_core.verdict.pairing import Failure
from flows.cli.main import app
from flows.release import candidate
from flows.release.measurements import measure
from flows.release.release import release
from infra.registry.tracking import mlflow_client, tracking_store
from infra.store import Store
from tasks.support.divergences import divergence_of, spots_of

NAME = "divergence-tests"


@pytest.fixture
def content(content):
    return content | {"registry": {"name": NAME}}


def artifact_of(key):
    with get_client(sync_client=True) as prefect:
        chosen = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        return prefect.read_artifacts(artifact_filter=chosen, sort=ArtifactSort.CREATED_DESC)[0]


def test_a_release_tells_its_divergence_everywhere(content, services_home, tmp_path):
    gates = content["gates"] | {"divergence": 1.0, "top1_agreement": 0.5}
    result = run_flow(release, parse_recipe(content | {"gates": gates}))
    metrics = result.as_dict()["metrics"]
    assert result.verdict.verdict == "promoted"
    json.dumps(metrics, allow_nan=False)

    client = mlflow_client(tracking_store(services_home)[0])
    data = client.get_run(result.run_id).data
    assert data.tags["gate.divergence"] == metrics["divergence"]["standing"]
    assert data.tags["gate.perplexity_token"] == "shown"
    file = client.download_artifacts(result.run_id, FILE, str(tmp_path))
    kept = load_divergence(Path(file))
    assert 0.001 < np.mean(kept.nats) < 0.2
    of_kept = {
        "divergence": np.mean(kept.nats),
        "divergence.max": np.max(kept.nats),
        "top1_agreement": np.mean(kept.agree),
    }
    for name, value in of_kept.items():
        assert metrics[name]["candidate"] == pytest.approx(value, rel=1e-5)
        assert data.metrics[f"{name}.candidate"] == pytest.approx(value, rel=1e-5)

    page = Path(unquote(urlparse(result.report.address).path)).read_text("utf-8")
    tree = document_fromstring(page, parser=HTMLParser(recover=False, huge_tree=True))
    assert len(tree.xpath("//ol[@class='spots']/li")) == 10
    assert tree.xpath("//mark")[0].text == kept.spots[0].token
    gate_names = [row.text for row in tree.xpath("(//table)[1]/tbody/tr/th")]
    assert gate_names[1:] == ["divergence (nats a token)", "top1_agreement (share of tokens)"]
    assert "divergence" in Path(result.checkpoint, "README.md").read_text("utf-8")
    assert len(json.loads(artifact_of("spots").data)) == 10
    assert "3 shown, 0 not shown" in artifact_of("verdict").data


def test_a_divergence_above_its_gate_rejects(content):
    gates = content["gates"] | {"divergence": 1e-6}
    result = run_flow(release, parse_recipe(content | {"gates": gates}))
    assert result.verdict.verdict == "rejected"
    assert result.verdict.reasons[0].startswith("divergence: ")
    assert "nats a token, which is not below" in result.verdict.reasons[0]


def test_a_gate_on_divergence_that_nobody_measured_is_no_verdict(recipe, monkeypatch):
    def without(*asked):
        return {name: found for name, found in measure(*asked).items() if name != DIVERGENCE}

    monkeypatch.setattr(candidate, "measure", without)
    gated = recipe.model_copy(
        update={"gates": recipe.gates.model_copy(update={"divergence": 0.04})}
    )
    with pytest.raises(NotMeasuredError, match="divergence: not measured"):
        run_flow(release, gated)


def test_the_ladder_and_an_evaluation_tell_it_too(dpq, recipe_file, quickstart_model, recipe):
    variants = {"dpq": {}}
    result = dpq("compare", "--json", "--set", f"variants={json.dumps(variants)}")
    assert result.exit_code == 0, result.stderr
    rows = {row["variant"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["dpq"]["error"] is None
    assert 0.001 < rows["dpq"]["distances"]["divergence"] < 0.2
    assert rows["bf16"]["distances"] == {}
    other = str(quickstart_model)
    command = ["evaluate", other, "--recipe", str(recipe_file), "--against", other, "--json"]
    report = json.loads(CliRunner().invoke(app, command).stdout)
    assert report["metrics"]["divergence"]["candidate"] < 1e-9
    assert report["metrics"]["top1_agreement"]["candidate"] == 1
    assert [row["suite"] for row in report["scores"]] == ["perplexity_token"]


def test_only_the_windows_that_judge_are_told(tmp_path):
    store = Store(tmp_path)
    windows = torch.arange(400).reshape(40, 10)
    found = text_divergence(
        Divergence(torch.rand(360).double(), torch.ones(360, dtype=torch.bool)), windows
    )
    artifact = store.get_or_make("scores", "a", lambda to: save_divergence(found, to / FILE))[0]
    measured = {DIVERGENCE: artifact}
    part = divergence_of(measured, store, JUDGING)
    assert set(part.windows) < set(found.windows)
    assert len(spots_of(measured, store, ALL)) == 10
    told = spots_of(measured, store, JUDGING)
    assert {spot.window for spot in told} <= set(part.windows)
    assert divergence_of({}, store, ALL) is None
    assert spots_of({}, store, ALL) == ()
    failed = Failure("failed: out of memory")
    assert divergence_of({DIVERGENCE: failed}, store, ALL) is failed
    assert spots_of({DIVERGENCE: failed}, store, ALL) == ()
