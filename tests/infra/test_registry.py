"""The registry in a real MLflow store on SQLite: versions, verdicts, and who is champion."""

from pathlib import Path

import pytest

from infra.registry import Registry, RegistryError
from infra.tracking import mlflow_client, tracked_run, tracking_store


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking_store(tmp_path_factory.mktemp("registry"))[0]


@pytest.fixture(scope="module")
def run_id(uri) -> str:
    with tracked_run(uri, "dpq", "release", {}, None) as run:
        return run.run_id


@pytest.fixture
def name(request) -> str:
    return request.node.name  # a registered model a test


@pytest.fixture
def registry(uri) -> Registry:
    return Registry(uri)


@pytest.fixture
def checkpoint(tmp_path) -> str:
    folder = tmp_path / "a checkpoint"  # outside of the run's artifacts
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder.as_uri()


def tags(uri: str, name: str, version: int) -> dict[str, str]:
    return mlflow_client(uri).get_model_version(name, str(version)).tags


def test_a_checkpoint_outside_of_the_run_is_registered_and_downloads(
    uri, registry, name, checkpoint, run_id, tmp_path, monkeypatch
):
    from mlflow.artifacts import download_artifacts

    version = registry.register(name, checkpoint, run_id, {"release_digest": "d1"})
    assert version == 1
    stored = mlflow_client(uri).get_model_version(name, "1")
    assert (stored.source, stored.run_id, stored.status) == (checkpoint, run_id, "READY")
    registry.promote(name, version)
    # As a user would: `models:/…` is looked up in the environment's registry, whatever is passed.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for address in (registry.uri(name, version), registry.uri(name)):
        got = Path(download_artifacts(address, dst_path=str(tmp_path / "downloads")))
        assert (got / "model.safetensors").read_bytes() == b"weights"


def test_a_release_is_found_by_its_tags_and_only_by_all_of_them(registry, name, run_id):
    assert registry.find(name, {"release_digest": "d1"}) is None  # no such model yet
    first = registry.register(name, "file:///a", run_id, {"release_digest": "d1", "kind": "x"})
    second = registry.register(name, "file:///b", run_id, {"release_digest": "d2", "kind": "x"})
    assert registry.find(name, {"release_digest": "d1"}) == first
    assert registry.find(name, {"release_digest": "d2", "kind": "x"}) == second
    assert registry.find(name, {"kind": "x"}) == second  # the newest
    assert registry.find(name, {"release_digest": "d1", "kind": "y"}) is None


def test_promotion_moves_the_alias_and_remembers_the_champion_before(uri, registry, name, run_id):
    assert registry.champion(name) is None
    versions = [registry.register(name, f"file:///{i}", run_id, {}) for i in range(3)]
    assert registry.champion(name) is None
    assert registry.promote(name, versions[0]) is None
    assert registry.promote(name, versions[1]) == versions[0]
    assert registry.champion(name) == versions[1]
    assert tags(uri, name, versions[0]) == {"verdict": "promoted"}
    promoted = {"verdict": "promoted", "previous_champion": str(versions[0])}
    assert tags(uri, name, versions[1]) == promoted
    assert registry.promote(name, versions[1]) == versions[0]  # again: nothing changes
    assert registry.champion(name) == versions[1]
    assert tags(uri, name, versions[1]) == promoted


def test_rejection_keeps_the_champion_and_says_why(uri, registry, name, run_id):
    good = registry.register(name, "file:///good", run_id, {})
    registry.promote(name, good)
    bad = registry.register(name, "file:///bad", run_id, {})
    registry.withhold(
        name, bad, "rejected", ["perplexity +0.07, limit 0.05", "accuracy −0.6, limit 0.5"]
    )
    assert registry.champion(name) == good
    assert tags(uri, name, bad) == {
        "verdict": "rejected",
        "reasons": "1. perplexity +0.07, limit 0.05\n2. accuracy −0.6, limit 0.5",
    }
    registry.promote(name, bad)  # with other gates, say
    assert tags(uri, name, bad) == {"verdict": "promoted", "previous_champion": str(good)}


def test_an_unknown_version_is_refused_and_the_champion_stays(registry, name, run_id):
    good = registry.register(name, "file:///good", run_id, {})
    registry.promote(name, good)
    with pytest.raises(Exception, match="not found"):
        registry.promote(name, 99)
    assert registry.champion(name) == good


def test_a_remote_server_is_not_given_a_local_folder(run_id):
    with pytest.raises(RegistryError, match="s3://"):
        Registry("http://127.0.0.1:9").register("model", "file:///tmp/x", run_id, {})


def test_addresses():
    assert Registry.uri("llama", 3) == "models:/llama/3"
    assert Registry.uri("llama") == "models:/llama@champion"
