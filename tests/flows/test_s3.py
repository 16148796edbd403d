"""A release from and to S3, over an endpoint that has bad moments."""

import json

import pytest
import s3fs
from conftest import run_flow

from dpq_core.checkpoint.exports import verify
from dpq_core.recipe import parse_recipe
from flows.release.release import release
from infra import remote
from infra.registry import Registry, RegistryError
from infra.registry.tracking import tracking_store
from infra.remote import RemoteError
from infra.store import ArtifactRef
from tasks.publish import destination_of, publish_release

BAD_MOMENTS = [503, "close", 500, "close"]


@pytest.fixture
def content(content, s3, quickstart_model, text_file):
    """Model, calibration and evaluation data on S3; a release goes there too."""
    s3fs.S3FileSystem().makedirs("pipeline", exist_ok=True)
    names = [path.name for path in quickstart_model.iterdir() if path.is_file()]
    remote.upload(quickstart_model, "s3://pipeline/model", names)
    remote.upload(text_file.parent, "s3://pipeline/data", [text_file.name])
    dataset = {"path": "json", "data_files": f"s3://pipeline/data/{text_file.name}"}
    evaluation = {"perplexity": content["evaluation"]["perplexity"] | {"dataset": dataset}}
    return content | {
        "model": {"id": "s3://pipeline/model"},
        "calibration": content["calibration"] | {"dataset": dataset},
        "evaluation": evaluation,
        "export": ["compressed-tensors"],
        "registry": {"name": "s3-tests", "destination": "s3://pipeline/releases/"},
    }


def test_from_and_to_s3(content, s3, services_home, tmp_path):
    s3.faults.extend(BAD_MOMENTS * 3)
    first = run_flow(release, parse_recipe(content))
    assert first.verdict.verdict == "promoted", first.verdict.reasons
    assert not s3.faults
    registry = Registry(tracking_store(services_home)[0])
    version = registry.champion("s3-tests")
    source = registry._client.get_model_version("s3-tests", str(version)).source
    assert source.startswith("s3://pipeline/releases/s3-tests/")
    for name in ("native", "compressed-tensors"):
        address = f"{source.removesuffix('/native')}/{name}"
        remote.download(address, remote.listing(address), tmp_path / name)
        verify(tmp_path / name)
    manifest = json.loads((tmp_path / "native" / "dpq.json").read_text())
    assert manifest["base_model"]["id"] == "s3://pipeline/model"
    assert manifest["files"] == first.manifest["files"]

    s3.requests.clear()
    again = run_flow(release, parse_recipe(content))
    assert again.registration.version == version
    assert not [path for method, path, _ in s3.requests if method == "PUT"]
    assert not [
        path for method, path, _ in s3.requests if method == "GET" and "safetensors" in path
    ]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.id=s3://pipeline/nothing", "s3://pipeline/nothing: nothing is there"),
        ("model.id=s3://pipeline/data", "s3://pipeline/data has no safetensors"),
        ("registry.destination=/srv/releases", "registry.destination"),
    ],
)
def test_bad_addresses(dpq, content, setting, expected):
    result = dpq("release", "--set", setting)
    assert result.exit_code == 1
    assert expected in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("manifest", ["dpq.json", "export.json", "manifest.json"])
def test_a_manifest_is_sent_last(s3, tmp_path, manifest):
    s3fs.S3FileSystem().makedirs("pipeline", exist_ok=True)
    for name in (manifest, "a.json", "weights.pt2"):
        (tmp_path / name).write_text(name)
    s3.requests.clear()
    publish_release.fn("s3://pipeline/order", "any", ArtifactRef(tmp_path.as_uri(), manifest, 1))
    sent = [path.rpartition("/")[2] for method, path, _ in s3.requests if method == "PUT"]
    assert sent == ["a.json", "weights.pt2", manifest]


SERVER, FILE = Registry("http://127.0.0.1:9"), Registry("sqlite:///mlflow.db")


@pytest.mark.parametrize(
    ("asked", "default", "registry", "found"),
    [
        (None, None, FILE, None),
        (None, "s3://pipeline/all", SERVER, "s3://pipeline/all"),
        ("s3://pipeline/mine", "s3://pipeline/all", SERVER, "s3://pipeline/mine"),
        ("s3://pipeline/mine", None, FILE, "s3://pipeline/mine"),
    ],
)
def test_where_a_release_goes(content, monkeypatch, asked, default, registry, found):
    monkeypatch.setenv("DPQ_DESTINATION", default or "")
    assert destination_of(asked, registry) == found
    if found:
        assert s3fs.S3FileSystem().find(found) == [f"{found.removeprefix('s3://')}/.dpq"]


@pytest.mark.parametrize(
    ("default", "error", "said"),
    [
        ("", RegistryError, "takes no local folder .* DPQ_DESTINATION=s3://"),
        ("/srv/releases", RemoteError, "DPQ_DESTINATION is '/srv/releases': it must be s3://"),
        ("s3://no-such-bucket", RemoteError, "no-such-bucket"),
    ],
)
def test_nowhere_to_go_is_found_before_any_work(s3, monkeypatch, default, error, said):
    monkeypatch.setenv("DPQ_DESTINATION", default)
    with pytest.raises(error, match=said):
        destination_of(None, SERVER)
