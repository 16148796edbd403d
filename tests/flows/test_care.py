"""`dpq store` and `dpq rollback`: what they print, and their exit codes."""

import hashlib
import json
import os
import time

import pytest
from prefect.client.orchestration import get_client
from typer.testing import CliRunner

from flows.cli.main import app
from infra.registry import Registry
from infra.registry.tracking import tracked_run, tracking_store
from infra.store import Store
from infra.store.owners import Owner

DAY = 86400


@pytest.fixture
def filled(tmp_path):
    """A store with an artifact of each of two stages, 20 days and no day old."""
    store = Store(tmp_path / "store")
    for stage, days in (("layers", 20), ("scores", 0)):
        key = hashlib.sha256(f"{tmp_path}{stage}".encode()).hexdigest()
        artifact, _ = store.get_or_make(stage, key, lambda f: (f / "x").write_bytes(bytes(1000)))
        then = time.time() - days * DAY
        os.utime(artifact.folder / ".used", (then, then))
    return store


@pytest.fixture
def dpq(services_home):
    def run(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        return result.exit_code, json.loads(result.stdout), result.stderr

    return run


def test_ls(dpq, filled):
    code, said, _ = dpq("store", "ls", "--store", filled.root)
    assert code == 0
    assert [(row["stage"], row["artifacts"]) for row in said["stages"]] == [
        ("layers", 1),
        ("scores", 1),
    ]
    assert all(row["bytes"] > 1000 for row in said["stages"])
    assert 19.9 < said["stages"][0]["days unused, most"] < 20.1
    shown = CliRunner().invoke(app, ["store", "ls", "--store", str(filled.root)])
    assert "layers" in shown.stdout
    assert " free of " in shown.stdout


def test_verify(dpq, filled):
    assert dpq("store", "verify", "--store", filled.root)[:2] == (0, {"artifacts": 2, "wrong": []})
    (wrong,) = filled.root.glob("layers/*/x")
    wrong.write_bytes(bytes(999) + b"\1")
    code, said, _ = dpq("store", "verify", "--store", filled.root)
    assert code == 2
    assert said["wrong"] == [f"{wrong}: content differs from the manifest"]


def test_gc(dpq, filled):
    command = ("store", "gc", "--store", filled.root)
    code, planned, _ = dpq(*command, "--dry-run")
    assert code == 0
    assert planned["dry_run"]
    assert [row["stage"] for row in planned["stages"]] == ["layers"]
    assert len(list(filled.folders())) == 2
    code, done, _ = dpq(*command)
    assert (code, done["bytes"]) == (0, planned["bytes"])
    assert [folder.parent.name for folder in filled.folders()] == ["scores"]
    with filled.in_use():  # a run that has found nothing yet
        code, done, errors = dpq(*command, "--keep-days", "0")
    assert [row["stage"] for row in done["stages"]] == ["scores"]
    assert f"process {os.getpid()} on " in errors


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["gc"], ["gc", "--dry-run"]])
def test_a_store_that_is_none(dpq, tmp_path, command):
    code, said, errors = dpq("store", *command, "--store", tmp_path / "none")
    assert code == 1
    assert "none: no such store; name it with --store" in errors
    assert said["verdict"] == "error"
    assert not (tmp_path / "none").exists()


def test_a_rollback_takes_the_place_of_a_promotion(dpq, filled, services_home, monkeypatch):
    """Prefect's limit and the registry's lease, both: it can be under way beside none."""
    uri, artifacts = tracking_store(services_home)
    registry, name = Registry(uri), filled.root.parent.name
    with tracked_run(uri, "dpq", "release", {}, artifacts) as run:
        for folder in filled.folders():
            registry.promote(name, registry.register(name, folder.as_uri(), run.run_id, {}))
    seen = []
    roll_back = Registry.roll_back

    def watched(self, *arguments):
        limit = client.read_global_concurrency_limit_by_name("promotion")
        (lease,) = (services_home / "mlflow" / "leases").glob("champion-*/*")
        seen.append((limit.active_slots, Owner.parse(lease.name).pid))
        return roll_back(self, *arguments)

    monkeypatch.setattr(Registry, "roll_back", watched)
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name("promotion", 1)
        code, _, errors = dpq("rollback", name, "--store", filled.root)
        assert code == 0, errors
        assert seen == [(1, os.getpid())]
        assert client.read_global_concurrency_limit_by_name("promotion").active_slots == 0
    # Prefect keeps a client for each limit, with the address of its first.
    monkeypatch.setattr("tasks.register.PROMOTION", "asked for at a rollback alone")
    monkeypatch.setattr("tasks.register._RESTART", 0.1)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    code, _, errors = dpq("rollback", name, "--store", filled.root)
    assert code == 1
    assert "PREFECT_API_URL is http://127.0.0.1:9/api, and nothing answers there" in errors


def test_rollback(dpq, filled, services_home):
    uri, artifacts = tracking_store(services_home)
    registry, name = Registry(uri), filled.root.parent.name
    folders = list(filled.folders())
    with tracked_run(uri, "dpq", "release", {}, artifacts) as run:
        for folder in folders:
            version = registry.register(name, folder.as_uri(), run.run_id, {})
            registry.promote(name, version)
    (folders[0] / "x").write_bytes(b"damaged")
    command = ("rollback", name, "--why", "slow", "--store", filled.root)
    code, _, errors = dpq(*command)
    assert code == 1
    assert "the version to return to is damaged, nothing was changed" in errors
    assert registry.champion(name) == 2
    (folders[0] / "x").write_bytes(bytes(1000))
    assert dpq(*command)[:2] == (0, {"name": name, "taken_back": 2, "champion": 1})
    assert registry.champion(name) == 1
    code, said, errors = dpq(*command)
    assert code == 1
    assert said["verdict"] == "error"
    assert "no version before it is left to roll back to" in errors
