"""The registry in a real MLflow store on SQLite: versions, verdicts, and who is champion."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infra.registry import BASE_MODEL, Registry, RegistryError, Rollback
from infra.registry.tracking import mlflow_client, tracked_run, tracking_store

REPOSITORY = Path(__file__).parents[2]


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
    return request.node.name.replace("[", "-").rstrip("]")  # a registered model a test


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


CANDIDATE = """
import sys
from infra.registry import Registry
from infra.store import Store
registry, store = Registry(sys.argv[1]), Store(sys.argv[2])
for line in sys.stdin:
    name, run_id, label = line.split()
    seen = registry.champion(name)
    print("ready", flush=True)
    sys.stdin.readline()
    with registry.exclusive(name, store):
        version = registry.find(name, {"release": label})
        if version is None:
            version = registry.register(name, f"file:///{label}", run_id, {"release": label})
        reason = registry.obstacle(name, version, seen)
        if reason is None:
            registry.promote(name, version)
    print(version, reason or "promoted", flush=True)
"""


@pytest.fixture(scope="module")
def candidates(uri, tmp_path_factory):
    """Two processes that register and promote what they are told."""
    store = tmp_path_factory.mktemp("store")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CANDIDATE, uri, str(store)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for _ in range(2)
    ]
    yield processes
    for process in processes:
        process.communicate(timeout=300)


@pytest.mark.parametrize("same_release", [False, True])
def test_of_two_that_finish_together_one_is_promoted_and_the_other_says_why(
    uri, registry, name, run_id, candidates, same_release
):
    first = registry.register(name, "file:///first", run_id, {})
    registry.promote(name, first)
    for candidate, label in zip(candidates, "aa" if same_release else "ab", strict=True):
        candidate.stdin.write(f"{name} {run_id} {label}\n")
    for candidate in candidates:
        assert candidate.stdout.readline() == "ready\n"  # both saw the first as champion
    for candidate in candidates:
        candidate.stdin.write("\n")
    said = [candidate.stdout.readline().strip() for candidate in candidates]
    champion = registry.champion(name)
    if same_release:
        assert said == 2 * [f"{champion} promoted"]
        assert champion == first + 1  # registered once
        return
    (won,) = (each for each in said if each.endswith("promoted"))
    (withheld,) = (each for each in said if each != won)
    assert won == f"{champion} promoted"
    assert f"version {champion} is champion of {name} now, and it was version {first}" in withheld
    assert tags(uri, name, champion)["previous_champion"] == str(first)


def sound(source):
    """A version's files are as they should be."""


def promoted_versions(registry, name, run_id, count):
    versions = [registry.register(name, f"file:///{i}", run_id, {}) for i in range(count)]
    for version in versions:
        registry.promote(name, version)
    return versions


def test_rollback_returns_step_by_step_and_no_further(uri, registry, name, run_id):
    with pytest.raises(RegistryError, match="no champion to roll back"):
        registry.roll_back(name, "by nobody", sound)
    first, second, third = promoted_versions(registry, name, run_id, 3)
    for bad, good in ((third, second), (second, first)):
        assert registry.roll_back(name, "by me: slow", sound) == Rollback(name, bad, good)
        assert registry.champion(name) == good
        assert re.fullmatch(
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC by me: slow", tags(uri, name, bad)["rolled_back"]
        )
    with pytest.raises(RegistryError, match=f"version {first} is champion, and no version before"):
        registry.roll_back(name, "by me", sound)
    assert registry.champion(name) == first
    assert "rolled_back" not in tags(uri, name, first)


def test_rollback_passes_over_what_was_rolled_back(registry, name, run_id):
    first, second = promoted_versions(registry, name, run_id, 2)
    registry.roll_back(name, "by me", sound)
    fourth = registry.register(name, "file:///4", run_id, {})
    registry.promote(name, fourth)
    assert registry.obstacle(name, second, fourth).startswith(f"version {second} of {name} is this")
    registry.promote(name, second)  # by hand
    assert registry.roll_back(name, "by me", sound).champion == fourth
    assert registry.roll_back(name, "by me", sound).champion == first


def test_nothing_changes_where_the_version_before_is_damaged(uri, registry, name, run_id):
    _, second = promoted_versions(registry, name, run_id, 2)

    def damaged(source):
        raise RegistryError(f"{source} is damaged")

    with pytest.raises(RegistryError, match="file:///0 is damaged"):
        registry.roll_back(name, "by me", damaged)
    assert registry.champion(name) == second
    assert "rolled_back" not in tags(uri, name, second)


def test_references_are_all_that_versions_say(registry, name, run_id):
    registry.register(name, "file:///only-here", run_id, {"checkpoint_sha256": "d" * 64})
    assert {"file:///only-here", "d" * 64} <= set(registry.references())


@pytest.mark.parametrize("name", ["it's", 'say "x"', "a b%;`\\ü"])
def test_every_name_is_found_by_mlflows_filter(registry, name, checkpoint, run_id):
    version = registry.register(name, checkpoint, run_id, {"release_digest": "d1"})
    assert registry.find(name, {"release_digest": "d1"}) == version
    assert registry.promote(name, version) is None
    assert registry.champion(name) == version


def test_a_version_says_what_it_was_made_of_or_its_run_does(uri, registry, name, checkpoint):
    with tracked_run(uri, "dpq", "release", {}, None) as run:
        run.log_params({"model": {"id": "org/of-the-run"}})
    older = registry.register(name, checkpoint, run.run_id, {})
    newer = registry.register(name, checkpoint, run.run_id, {BASE_MODEL: "org/of-the-tag"})
    assert registry.base_model(name, older) == "org/of-the-run"
    assert registry.base_model(name, newer) == "org/of-the-tag"
    mlflow_client(uri).delete_run(run.run_id)
    assert registry.base_model(name, newer) == "org/of-the-tag"
