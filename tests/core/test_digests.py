"""Digests name content: the same for the same, another for another."""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import dpq_core
from dpq_core.digests import _code_digest, code_digest, digest, file_digest, identity


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})


def test_digest_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="JSON"):
        digest({"a": float("nan")})


def test_file_digest_is_sha256(tmp_path):
    path = tmp_path / "empty"
    path.write_bytes(b"")
    assert file_digest(path).startswith("e3b0c44298fc1c149afbf4c8996fb924")


@pytest.mark.parametrize("over", ["in place", "by another file"])
def test_an_identity_changes_with_content_of_the_same_size_and_time(tmp_path, over):
    """As `cp -p`, `tar` and `rsync -t` leave it."""
    path, other = tmp_path / "weights", tmp_path / "other"
    path.write_bytes(b"old")
    before, stat = identity(path), path.stat()
    other.write_bytes(b"new")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if over == "in place":
        shutil.copyfile(other, path)
        shutil.copystat(other, path)
    else:
        other.rename(path)
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert identity(path) != before
    assert identity(path) == identity(path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `toy`: `toy.top` imports `toy.low`; `toy.apart` is not reached."""
    sources = {
        "__init__": "",
        "top": "from toy.low import value\nimport json\n",
        "low": "value = 1\n",
        "apart": "",
    }
    folder = tmp_path / "toy"
    folder.mkdir()
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
        monkeypatch.delitem(sys.modules, name)  # another test's
    _code_digest.cache_clear()
    yield folder
    _code_digest.cache_clear()


@pytest.mark.parametrize(
    ("module", "changes"), [("top", True), ("low", True), ("apart", False), ("__init__", False)]
)
def test_code_digest_follows_the_imports(package, module, changes):
    before = code_digest("toy.top")
    (package / f"{module}.py").write_text("value = 2\n")
    _code_digest.cache_clear()
    assert (code_digest("toy.top") != before) == changes


def test_code_digest_in_many_threads_at_once():
    top = Path(dpq_core.__file__).parents[1]
    paths = Path(dpq_core.__file__).parent.rglob("[!_]*.py")
    modules = [".".join(path.relative_to(top).with_suffix("").parts) for path in paths]
    _code_digest.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(code_digest, modules * 4))
    _code_digest.cache_clear()
    assert together == [code_digest(module) for module in modules] * 4
