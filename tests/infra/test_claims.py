"""A name of this machine is one process's at a time, and free when that has ended."""

import subprocess
import sys

import pytest

from infra.store.claims import claims

HOLDER = """
import sys, time
from infra.store.claims import claims
held = next(claims(sys.argv[1:]))
print(held.name, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def names(found):
    return [claim.name for claim in found]


def test_each_once_until_it_is_released():
    mine = list(claims(["cuda-0", "cuda-1", "cuda-2"]))
    assert names(mine) == ["cuda-0", "cuda-1", "cuda-2"]
    assert names(claims(["cuda-2", "cuda-3"])) == ["cuda-3"]
    mine[1].release()
    mine[1].release()
    (again,) = claims(["cuda-0", "cuda-1", "cuda-2"])
    assert again.name == "cuda-1"


def test_an_odd_name_stays_in_the_folder(tmp_path):
    (claim,) = claims(["cuda-../../GPU:1/2"])
    assert claim.name == "cuda-../../GPU:1/2"
    assert [path.name for path in (tmp_path / "dpq-claims").iterdir()] == ["cuda-.._.._GPU_1_2"]


def test_another_process_s_until_it_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, "cuda-0", "cuda-1"], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "cuda-0\n"
        assert names(claims(["cuda-0", "cuda-1"])) == ["cuda-1"]
        holder.kill()
        holder.wait()
    assert names(claims(["cuda-0"])) == ["cuda-0"]
