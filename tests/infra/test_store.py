"""Artifacts exist whole or not at all, and are never other than their references say."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infra.store import ArtifactRef, Store, StoreError, StoreFullError

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


MAKING = """
import sys, time
from pathlib import Path
from infra.store import Store
store, log = Store(sys.argv[1]), Path(sys.argv[2])
def make(folder):
    with log.open("a") as file:
        file.write("made\\n")
    time.sleep(0.05)
    (folder / "content.txt").write_text("one")
with store.in_use():
    print("ready", flush=True)
    sys.stdin.readline()
    references = [store.get_or_make("stage", str(key), make)[0].sha256 for key in range(20)]
    print(*references, flush=True)
    sys.stdin.readline()
"""


def process(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_share_the_work(store, tmp_path):
    log = tmp_path / "log"
    with process(MAKING, store.root, log) as one, process(MAKING, store.root, log) as two:
        for each in (one, two):
            assert each.stdout.readline() == "ready\n"
        for each in (one, two):
            each.stdin.write("\n")
            each.stdin.flush()
        assert one.stdout.readline() == two.stdout.readline() != ""
        one.stdin.close()
        two.stdin.close()
    assert log.read_text() == 20 * "made\n"
    assert list((store.root / "leases").iterdir()) == []


def test_a_full_disk_is_named_and_the_work_goes_on_when_there_is_room(tmp_path):
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs root to mount a small disk: {mounted.stderr.strip()}")
    try:
        small = Store(folder)
        kept, _ = small.get_or_make("stage", "first", write("one"))
        filler = folder / "filler"
        filler.write_bytes(bytes(200_000))

        def large(folder):  # as a library does it, which has its own errors
            save_file({"x": torch.zeros(40_000)}, folder / "x.safetensors")

        with pytest.raises(StoreFullError, match=r"small disk: .* free of 307\.2 kB.*stage/second"):
            small.get_or_make("stage", "second", large)
        assert list((folder / "tmp").iterdir()) == list((folder / "leases").iterdir()) == []
        assert small.problems(kept.folder) == []
        filler.unlink()
        made, new = small.get_or_make("stage", "second", large)
        assert new
        small.open(made)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_problems_name_every_file(store):
    made, _ = store.get_or_make("stage", "key", write("one"))
    assert store.problems(made.folder) == []
    inner = made.folder / "inner" / "content.txt"
    inner.write_text("two")
    assert store.problems(made.folder) == [f"{inner}: content differs from the manifest"]
    inner.write_text("on")
    assert store.problems(made.folder) == [f"{inner}: 2 bytes, 3 in the manifest"]
    inner.unlink()
    assert store.problems(made.folder) == [f"{inner}: missing"]
    (made.folder / ".artifact.json").write_text("{")
    assert "unreadable" in store.problems(made.folder)[0]
