"""A release's report where people find it, and what must be in nothing that a release leaves."""

import json
import os
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import s3fs
from conftest import run_flow
from lxml.html import HTMLParser, document_fromstring
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort, LogSort

from dpq_core.recipe import parse_recipe
from flows.release.release import release
from flows.reporting import page
from infra import remote
from infra.registry.tracking import mlflow_client, tracking_store

NAME = "report-tests"
PLANTED = "planted/Secret+0123456789abcdef"


@pytest.fixture
def content(content):
    return content | {"registry": {"name": NAME}}


def tree_at(address):
    page = Path(unquote(urlparse(address).path)).read_text("utf-8")
    return document_fromstring(page, parser=HTMLParser(recover=False, huge_tree=True))


def text_of(tree, path):
    return " ".join(" ".join(node.text_content().split()) for node in tree.xpath(path))


def test_a_report_is_in_mlflow_on_the_run_page_and_on_the_terminal(content, services_home, dpq):
    result = run_flow(release, parse_recipe(content))
    address = result.report.address
    client = mlflow_client(tracking_store(services_home)[0])
    run = client.get_run(result.run_id)
    assert run.data.tags["report"] == address == f"{run.info.artifact_uri}/report.html"
    with get_client(sync_client=True) as prefect:
        reports = ArtifactFilter(key=ArtifactFilterKey(any_=["report"]))
        found = prefect.read_artifacts(artifact_filter=reports, sort=ArtifactSort.CREATED_DESC)
    (link,) = [a for a in found if address in str(a.data)]
    assert link.flow_run_id

    version = result.registration.version
    metric = result.verdict.metrics["perplexity_token"]
    tree = tree_at(address)
    assert text_of(tree, "//h1") == f"promoted {NAME} version {version}"
    cells = [node.text_content() for node in tree.xpath("(//table)[1]/tbody/tr[1]/*")]
    assert cells[:3] == ["perplexity_token", f"{metric.baseline:.4f}", f"{metric.candidate:.4f}"]
    windows = result.manifest["calibration"]["windows"]
    assert windows in text_of(tree, "//dd")
    calibration = result.manifest["calibration"]
    assert (calibration["tokens"], calibration["tokens_asked"]) == (1024, 1024)
    assert "1,024 of 1,024 tokens asked for, 1.6 for each" in text_of(tree, "//dd")
    worst = max(result.manifest["layers"], key=lambda row: row["error"])
    assert tree.xpath("//td[@data-title='layer']")[0].text_content() == worst["name"]

    rejected = dpq("release", "--json", "--set", "gates.perplexity_increase=0.000001")
    assert rejected.exit_code == 2, rejected.stderr
    told = json.loads(rejected.stdout)
    assert told["report_error"] is None
    tree = tree_at(told["report"])
    assert text_of(tree, "//h1") == f"rejected {NAME} version {version + 1}"
    assert f"Version {version} is champion" in text_of(tree, "//header")
    assert told["reasons"][0] == text_of(tree, "//header//li")
    versions = [node.text_content() for node in tree.xpath("//table[.//th='registered']//tr/th[1]")]
    assert versions == ["version", f"{version + 1} (this one)", f"{version} (champion)"]


def test_a_report_that_fails_is_seen_and_the_verdict_stands(
    content, services_home, dpq, monkeypatch
):
    def broken(data):
        raise OSError("no room for a page")

    monkeypatch.setattr(page, "page", broken)
    shown = dpq("release")
    assert shown.exit_code == 0, shown.stderr
    assert "promoted" in shown.stdout
    assert "report failed: OSError: no room for a page" in shown.stdout
    told = json.loads(dpq("release", "--json").stdout)
    assert (told["verdict"], told["report"]) == ("promoted", None)
    assert told["report_error"] == "OSError: no room for a page"
    run = mlflow_client(tracking_store(services_home)[0]).get_run(told["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["report"] == "failed: OSError: no room for a page"


def holding(needle, *folders):
    """Files under `folders` that hold a text."""
    return {
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and needle.encode() in path.read_bytes()
    }


@pytest.fixture
def planted(s3, monkeypatch):
    """Credentials of whoever runs a release, in use: its data lie on S3."""
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, PLANTED)
    s3fs.S3FileSystem.clear_instance_cache()
    return PLANTED


def test_credentials_are_in_nothing_that_a_release_leaves(
    content, planted, services_home, store, text_file, dpq, tmp_path, capfd
):
    s3fs.S3FileSystem().makedirs("secrets", exist_ok=True)
    remote.upload(text_file.parent, "s3://secrets/data", [text_file.name])
    data = "evaluation.perplexity.dataset.data_files"
    good = dpq("release", "--set", f"{data}=s3://secrets/data/{text_file.name}")
    assert good.exit_code == 0, good.stderr
    missing = dpq("release", "--set", f"{data}=s3://secrets/data/none.jsonl")
    assert missing.exit_code == 1
    mirror = f"https://someone:{planted}@mirror.example/lm-eval"
    refused = dpq("release", "--json", "--set", f"evaluation.data_mirror={mirror}")
    assert refused.exit_code == 1
    assert "evaluation.data_mirror: an address with a password" in refused.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"https://someone:{planted}@tracking.example")
        tracked = dpq("release")
    assert tracked.exit_code == 1
    assert "MLFLOW_TRACKING_PASSWORD" in tracked.stderr

    said = "".join(
        [each.stdout + each.stderr for each in (good, missing, refused, tracked)]
        + list(capfd.readouterr())
    )
    assert planted not in said
    # What a release leaves is where this looks: the name is in all of these.
    names = {path.name for path in holding(NAME, services_home)}
    assert {"report.html", "mlflow.db"} <= names
    assert any(name.startswith("prefect.db") for name in names)
    assert holding("MLFLOW_TRACKING_PASSWORD", services_home / "logs")
    for secret in (planted, "planted%2FSecret"):
        assert not holding(secret, services_home, store, Path.home() / ".prefect")
    with get_client(sync_client=True) as prefect:
        kept = [
            *prefect.read_artifacts(sort=ArtifactSort.CREATED_DESC),
            *prefect.read_flow_runs(sort=FlowRunSort.END_TIME_DESC),
            *prefect.read_logs(sort=LogSort.TIMESTAMP_DESC),
        ]
    assert kept
    assert planted not in "".join(each.model_dump_json() for each in kept)
    assert planted in os.environ["AWS_SECRET_ACCESS_KEY"]
