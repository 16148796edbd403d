"""Nothing that anybody refers to is deleted: a real registry, and real processes at work."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from test_store import MAKING, process, write

from infra.care import DAY, StoreCareError, collect, stored
from infra.registry import Registry
from infra.registry.tracking import tracked_run, tracking_store
from infra.store import COLLECTOR, Store

KEYS = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a", "b", "c", "d")}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking_store(tmp_path_factory.mktemp("registry"))[0]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def make(store, name, days=0):
    artifact, _ = store.get_or_make("checkpoints", KEYS[name], write(name))
    then = time.time() - days * DAY
    os.utime(artifact.folder / ".used", (then, then))
    return artifact


def left(store):
    return {name for name, key in KEYS.items() if (store.root / "checkpoints" / key).exists()}


def names(artifacts):
    return {name for name, key in KEYS.items() for each in artifacts if each.folder.name == key}


def test_what_is_old_goes_and_a_dry_run_only_says_so(store, uri):
    make(store, "a", days=3)
    make(store, "b", days=1)
    planned = collect(store, [uri], 2 * DAY, dry_run=True)
    assert names(planned.deleted) == {"a"}
    assert left(store) == {"a", "b"}
    manifest = planned.deleted[0].folder / ".artifact.json"
    assert planned.deleted[0].size == manifest.stat().st_size + len("a")
    assert names(collect(store, [uri], 2 * DAY, dry_run=False).deleted) == {"a"}
    assert left(store) == {"b"}
    assert list((store.root / "tmp").iterdir()) == []
    made, new = store.get_or_make("checkpoints", KEYS["a"], write("a"))
    assert new
    store.open(made)


def test_what_a_version_refers_to_stays(store, uri):
    by_source, by_tag = make(store, "a", days=9), make(store, "b", days=9)
    make(store, "c", days=9)
    registry = Registry(uri)
    with tracked_run(uri, "dpq", "release", {}, None) as run:
        registry.register("model", by_source.uri, run.run_id, {})
        exported = {"checkpoint_sha256": by_tag.sha256}
        registry.register("model", "s3://elsewhere/export", run.run_id, exported)
    result = collect(store, [uri], 0, dry_run=False)
    assert names(result.deleted) == {"c"}
    assert names(result.registered) == {"a", "b"}
    assert left(store) == {"a", "b"}


def test_a_remembered_registry_is_asked_or_nothing_goes(store, uri, tmp_path):
    registered = make(store, "a", days=9)
    with tracked_run(uri, "dpq", "release", {}, None) as run:
        Registry(uri).register("model", registered.uri, run.run_id, {})
    store.remember_registry(uri)
    assert collect(store, [], 0, dry_run=False).deleted == []
    lost = f"sqlite:///{tmp_path / 'lost.db'}"
    store.remember_registry(lost)
    make(store, "b", days=9)
    with pytest.raises(StoreCareError, match=r"lost\.db .*nothing was deleted; if .* remove /"):
        collect(store, [], 0, dry_run=False)
    assert left(store) == {"a", "b"}


def test_what_a_living_run_found_or_made_stays_until_it_is_gone(store, uri, tmp_path):
    make(store, "d", days=9)
    store.get_or_make("stage", "0", write("one"))
    store.get_or_make("stage", "unused", write("one"))
    with process(MAKING, store.root, tmp_path / "log") as run:
        assert run.stdout.readline() == "ready\n"
        run.stdin.write("\n")
        run.stdin.flush()
        assert run.stdout.readline()
        result = collect(store, [uri], 0, dry_run=False)
        kept = {path.name for path in (store.root / "stage").iterdir()}
        assert kept == {str(number) for number in range(20)}  # 0 was found, the others made
        assert result.runs == [f"process {run.pid} on {next(iter(store.runs.living())).host}"]
        assert left(store) == set()
        run.kill()
    assert len(collect(store, [uri], 0, dry_run=False).deleted) == 20


def test_a_finder_waits_for_the_collector(store):
    make(store, "a")
    found = []
    finder = threading.Thread(target=lambda: found.append(store.find("checkpoints", KEYS["a"])))
    with store.lease(COLLECTOR):
        finder.start()
        time.sleep(0.3)
        assert not found
        store.set_aside(store.root / "checkpoints" / KEYS["a"])
    finder.join(timeout=300)
    assert found == [None]


def test_an_artifact_of_no_store(tmp_path):
    with pytest.raises(StoreCareError, match="no such store"):
        list(stored(Store(tmp_path / "nowhere")))
    assert not Path(tmp_path / "nowhere").exists()
