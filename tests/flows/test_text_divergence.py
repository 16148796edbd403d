"""A candidate's divergence, from beside its scores to all that people read. It is planted here."""

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
from flows import compare, evaluate
from flows.cli.main import app
from flows.release import candidate
from flows.release.measurements import measure
from flows.release.release import release
from infra.registry.tracking import mlflow_client, tracking_store
from infra.store import Store
from tasks.support import tokenized_data
from tasks.support.divergences import divergence_of, spots_of
from tasks.support.model import load_tokenizer

NAME = "divergence-tests"


@pytest.fixture
def content(content):
    return content | {"registry": {"name": NAME}}


@pytest.fixture
def planted(monkeypatch):
    """Every candidate's scores have a divergence beside them, and a function that says of it what
    the baseline's and candidate's hidden states would."""

    def measured(recipe, data, subject):
        scores = measure(recipe, data, subject)
        store = Store(recipe.execution.store)
        windows = tokenized_data.load(data.perplexity, store)
        tokens = windows.shape[0] * (windows.shape[1] - 1)
        nats = torch.linspace(0, 0.1, tokens, dtype=torch.float64)
        found = text_divergence(
            Divergence(nats, nats < 0.095), windows, load_tokenizer(subject.folder, False)
        )

        def make(folder):
            save_divergence(found, folder / FILE)

        key = f"{subject.digest}-divergence"
        artifact = store.get_or_make("scores", key, make)[0]
        return {**scores, DIVERGENCE: artifact}

    for module in (candidate, compare, evaluate):
        monkeypatch.setattr(module, "measure", measured)


def artifact_of(key):
    with get_client(sync_client=True) as prefect:
        chosen = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        return prefect.read_artifacts(artifact_filter=chosen, sort=ArtifactSort.CREATED_DESC)[0]


def test_a_release_tells_its_divergence_everywhere(planted, content, services_home, tmp_path):
    gates = content["gates"] | {"divergence": 0.06, "top1_agreement": 0.9}
    result = run_flow(release, parse_recipe(content | {"gates": gates}))
    metrics = result.as_dict()["metrics"]
    assert result.verdict.verdict == "promoted"
    assert metrics["divergence"]["candidate"] == pytest.approx(0.05)
    assert metrics["divergence.max"]["candidate"] == pytest.approx(0.1)
    assert metrics["top1_agreement"]["candidate"] == pytest.approx(0.95, abs=0.01)
    json.dumps(metrics, allow_nan=False)

    client = mlflow_client(tracking_store(services_home)[0])
    data = client.get_run(result.run_id).data
    assert data.metrics["divergence.p99.candidate"] == pytest.approx(0.099, rel=1e-3)
    assert data.tags["gate.divergence"] == metrics["divergence"]["standing"]
    assert data.tags["gate.perplexity_token"] == "shown"
    file = client.download_artifacts(result.run_id, FILE, str(tmp_path))
    kept = load_divergence(Path(file))
    assert np.mean(kept.nats) == pytest.approx(0.05)

    page = Path(unquote(urlparse(result.report.address).path)).read_text("utf-8")
    tree = document_fromstring(page, parser=HTMLParser(recover=False, huge_tree=True))
    assert len(tree.xpath("//ol[@class='spots']/li")) == 10
    assert tree.xpath("//mark")[0].text == kept.spots[0].token
    gate_names = [row.text for row in tree.xpath("(//table)[1]/tbody/tr/th")]
    assert gate_names[1:] == ["divergence (nats a token)", "top1_agreement (share of tokens)"]
    assert "divergence" in Path(result.checkpoint, "README.md").read_text("utf-8")
    assert len(json.loads(artifact_of("spots").data)) == 10
    assert "2 shown, 1 not shown (top1_agreement: about " in artifact_of("verdict").data


def test_a_divergence_above_its_gate_rejects(planted, content):
    gates = content["gates"] | {"divergence": 0.04}
    result = run_flow(release, parse_recipe(content | {"gates": gates}))
    assert result.verdict.verdict == "rejected"
    assert result.verdict.reasons[0].startswith("divergence: 0.05 nats a token, which is not below")


def test_a_gate_on_divergence_that_nobody_measured_is_no_verdict(recipe):
    gated = recipe.model_copy(
        update={"gates": recipe.gates.model_copy(update={"divergence": 0.04})}
    )
    with pytest.raises(NotMeasuredError, match="divergence: not measured"):
        run_flow(release, gated)


def test_the_ladder_and_an_evaluation_tell_it_too(
    planted, dpq, recipe_file, quickstart_model, recipe
):
    variants = {"dpq": {}}
    result = dpq("compare", "--json", "--set", f"variants={json.dumps(variants)}")
    assert result.exit_code == 0, result.stderr
    rows = {row["variant"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["dpq"]["error"] is None
    assert rows["dpq"]["distances"]["divergence"] == pytest.approx(0.05)
    assert rows["bf16"]["distances"] == {}
    other = str(quickstart_model)
    command = ["evaluate", other, "--recipe", str(recipe_file), "--against", other, "--json"]
    report = json.loads(CliRunner().invoke(app, command).stdout)
    assert report["metrics"]["divergence"]["candidate"] == pytest.approx(0.05)
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
