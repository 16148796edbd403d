"""A store deletes what is its own, in one step; who reads beside that sees all of it or none."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_store import process, write

from infra.care import collect, problems, stored
from infra.store import ArtifactRef, Store, StoreError
from infra.store.manifest import Manifest
from infra.store.marker import MARKER
from infra.store.owners import Owner

REPOSITORY = Path(__file__).parents[2]
KEY = 64 * "a"
LONG_AGO = 1e9  # s since 1970


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def home(tmp_path):
    """Somebody's folder, with a `tmp` that was not looked at for years."""
    for name in ("tmp/photos/summer.jpg", "tmp/2019.07.beach.final.jpg", "letters/1.txt"):
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for path in (tmp_path / "home").rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return tmp_path / "home"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.clean(),
        lambda store: store.get_or_make("stage", KEY, write("one")),
        lambda store: store.in_use().__enter__(),
        lambda store: store.lease("name"),
        lambda store: store.remember_registry("sqlite:///x"),
        lambda store: list(stored(store)),
        lambda store: collect(store, [], 0, dry_run=False),
    ],
)
def test_somebody_s_folder_is_no_store_and_stays_as_it_is(home, use):
    before = contents(home)
    with pytest.raises(StoreError, match=r"home: not empty, and no store .*touch '.*\.dpq-store'"):
        use(Store(home))
    assert contents(home) == before


def test_a_folder_that_its_owner_has_marked_loses_names_of_our_form_alone(home):
    (home / MARKER).touch()
    me = Owner.new()
    dead = f"{me.pid}.{me.started - 100}.{me.place}.{me.tag}.{me.host}"
    far = f"{me.pid}.{me.started}.{me.place[::-1]}.{me.tag}.{me.host}"
    for name in (dead, far):
        (home / "tmp" / name).mkdir()
        os.utime(home / "tmp" / name, (LONG_AGO, LONG_AGO))
    before = contents(home)
    Store(home).clean()
    assert contents(home) == before
    assert {path.name for path in (home / "tmp").iterdir()} == {
        "photos",
        "2019.07.beach.final.jpg",
    }


def test_a_store_that_was_made_before_markers_is_known(store):
    made, _ = store.get_or_make("stage", KEY, write("one"))
    (made.folder.parent / f"{KEY}-gptq").mkdir()  # as `dpq export` once left them
    (store.root / MARKER).unlink()
    assert store.get_or_make("stage", KEY, write("two")) == (made, False)
    store.clean()
    assert (store.root / MARKER).is_file()
    (store.root / MARKER).unlink()
    (store.root / "letters").mkdir()
    (store.root / "letters" / "1.txt").touch()
    with pytest.raises(StoreError, match="no store"):
        store.clean()


def test_a_store_of_a_later_release_is_refused(store):
    store.get_or_make("stage", KEY, write("one"))
    (store.root / MARKER).write_text("format 2")
    with pytest.raises(StoreError, match=r"'format 2' is unknown: this release reads 'format 1'"):
        store.clean()


def test_a_home_is_the_user_s(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("~/store").root == tmp_path.resolve() / "store"


def test_two_that_make_one_store_at_once(tmp_path):
    for number in range(50):
        root, failed = tmp_path / str(number), []

        def make(root=root, failed=failed):
            try:
                Store(root).get_or_make("stage", KEY, write("one"))
            except StoreError as error:
                failed.append(error)

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed


def test_only_an_artifact_of_the_store_is_removed(store, home):
    store.get_or_make("stage", KEY, write("one"))
    for folder in (home, home / "letters", store.root, store.root / "stage", store.root / "leases"):
        with pytest.raises(StoreError, match="is no artifact of"):
            store.remove(ArtifactRef(folder.as_uri(), "", 0))
    assert contents(home)


DIES_WHILE_REMOVING = """
import os, shutil, signal, sys
from pathlib import Path
from infra.store import Store
store = Store(sys.argv[1])
rmtree = shutil.rmtree
def dies(folder, **options):
    rmtree(next(Path(folder).glob("inner")))  # some of it, and the manifest perhaps before that
    os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree = dies
store.remove(store.find("stage", sys.argv[2]))
"""


def test_killed_while_it_removes_and_the_key_is_as_good_as_new(store):
    store.get_or_make("stage", KEY, write("one"))
    run = subprocess.run(
        [sys.executable, "-c", DIES_WHILE_REMOVING, str(store.root), KEY],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    assert store.find("stage", KEY) is None
    made, new = store.get_or_make("stage", KEY, write("one"))
    assert new
    store.open(made)
    store.clean()
    assert list((store.root / "tmp").iterdir()) == []


def test_what_an_earlier_release_left_half_removed_is_made_again(store):
    made, _ = store.get_or_make("stage", KEY, write("one"))
    (made.folder / ".artifact.json").unlink()
    again, new = store.get_or_make("stage", KEY, write("one"))
    assert (again, new) == (made, True)
    store.open(again)


COMES_AND_GOES = """
import sys
from infra.store import Store
store = Store(sys.argv[1])
def make(folder):
    (folder / "content.txt").write_text("one")
print("ready", flush=True)
for _ in range(400):
    store.remove(store.get_or_make("stage", sys.argv[2], make)[0])
"""


def test_finding_beside_removal(store):
    """Of real processes: what is found is whole, or not there."""
    found = missing = 0
    ends = []
    with process(COMES_AND_GOES, store.root, KEY) as other:
        assert other.stdout.readline() == "ready\n"
        while other.poll() is None:
            artifact = store.find("stage", KEY)
            found, missing = found + bool(artifact), missing + (artifact is None)
            try:
                if artifact:
                    assert (store.open(artifact) / "content.txt").read_text() == "one"
            except (StoreError, FileNotFoundError) as error:  # before or after it was opened
                ends.append(str(error))
        assert other.returncode == 0
    assert found > len(ends)
    assert missing
    assert all("artifact is missing" in end or "content.txt" in end for end in ends)


def test_what_is_made_anew_while_we_look_is_not_taken_for_damaged(store, monkeypatch):
    made, _ = store.get_or_make("stage", KEY, write("one"))
    sizes, looks = Manifest.has_sizes_of, []

    def has_sizes_of(manifest, folder):
        looks.append(folder)
        if len(looks) > 1:
            return sizes(manifest, folder)
        store.remove(made)
        assert not sizes(manifest, folder)
        monkeypatch.setattr(Manifest, "has_sizes_of", sizes)
        store.get_or_make("stage", KEY, write("one"))
        monkeypatch.setattr(Manifest, "has_sizes_of", has_sizes_of)
        return False

    monkeypatch.setattr(Manifest, "has_sizes_of", has_sizes_of)
    assert store.find("stage", KEY) == made
    assert store.problems(made.folder) == []


def test_what_is_made_anew_while_we_read_is_no_damage(store, monkeypatch):
    made, _ = store.get_or_make("stage", KEY, write("one"))
    check = Manifest.problems

    def problems(manifest, folder):
        monkeypatch.setattr(Manifest, "problems", check)
        store.remove(made)
        found = check(manifest, folder)
        store.get_or_make("stage", KEY, write("one"))
        return found

    monkeypatch.setattr(Manifest, "problems", problems)
    assert (store.open(made) / "inner" / "content.txt").read_text() == "one"


def test_care_beside_removal(store, monkeypatch):
    """`dpq store` beside a run that has no more use for something."""
    artifacts = [store.get_or_make("stage", key * 64, write(key))[0] for key in "abc"]
    listed = stored(store)
    first = next(listed)
    store.remove(artifacts[1])
    assert [each.folder for each in listed] == [artifacts[2].folder]
    store.remove(artifacts[0])
    assert store.problems(first.folder)
    assert problems(store, first) == []
    set_aside = Store.set_aside

    def late(self, folder):
        shutil.rmtree(folder)
        return set_aside(self, folder)

    monkeypatch.setattr(Store, "set_aside", late)
    time.sleep(0.01)
    collect(store, [], 0, dry_run=False)
    assert not list(store.folders())
