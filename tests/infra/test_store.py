"""Artifacts exist whole or not at all, and are never other than their references say."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra.store import ArtifactRef, Store, StoreError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "a folder with spaces, and ümlauts")


def write(text):
    def make(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "content.txt").write_text(text)

    return make


def test_made_once_then_found(store):
    made, new = store.get_or_make("stage", "key", write("one"))
    found, again = store.get_or_make("stage", "key", write("two"))
    assert (new, again) == (True, False)
    assert found == made
    assert (store.open(found) / "inner" / "content.txt").read_text() == "one"
    assert found.size == 3


def test_reference_survives_json(store):
    made, _ = store.get_or_make("stage", "key", write("one"))
    again = ArtifactRef(**json.loads(json.dumps(made.__dict__)))
    assert store.open(again) == made.folder


def test_same_content_same_digest(store):
    references = [store.get_or_make("stage", key, write("one"))[0] for key in ("a", "b")]
    assert references[0].sha256 == references[1].sha256
    assert references[0].uri != references[1].uri


def test_an_error_leaves_nothing(store):
    def fail(folder):
        write("half")(folder)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        store.get_or_make("stage", "key", fail)
    assert store.find("stage", "key") is None
    assert list((store.root / "tmp").iterdir()) == []


KILLED = """
import os, signal, sys
from infra.store import Store
with Store(sys.argv[1]).writing("stage", "key") as folder:
    (folder / "content.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_no_artifact_and_is_cleaned_up_after(store):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(store.root)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    assert store.find("stage", "key") is None
    assert len(list((store.root / "tmp").iterdir())) == 1
    with store.writing("stage", "mine"):  # of a living process: stays
        store.clean()
        assert len(list((store.root / "tmp").iterdir())) == 1


def test_the_first_of_two_writers_wins(store):
    with store.writing("stage", "key") as slow:
        write("slow")(slow)
        fast, _ = store.get_or_make("stage", "key", write("fast"))
    assert store.find("stage", "key") == fast
    assert (fast.folder / "inner" / "content.txt").read_text() == "fast"


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["inner/content.txt", ".artifact.json"])
def test_tampering_is_found_on_opening(store, name):
    made, _ = store.get_or_make("stage", "key", write("one"))
    flip_a_byte(made.folder / name)
    with pytest.raises((StoreError, json.JSONDecodeError)):
        store.open(made)


@pytest.mark.parametrize("damage", [lambda path: path.write_text("on"), lambda path: path.unlink()])
def test_a_truncated_artifact_is_made_again(store, damage):
    made, _ = store.get_or_make("stage", "key", write("one"))
    damage(made.folder / "inner" / "content.txt")
    assert store.find("stage", "key") is None
    again, new = store.get_or_make("stage", "key", write("one"))
    assert new
    assert again == made
    store.open(again)


def test_a_missing_artifact_and_an_unknown_version_are_named(store):
    made, _ = store.get_or_make("stage", "key", write("one"))
    manifest = made.folder / ".artifact.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(StoreError, match="version 99 is unknown"):
        store.find("stage", "key")
    store.remove(made)
    store.remove(made)  # twice is fine
    with pytest.raises(StoreError, match="missing"):
        store.open(made)
