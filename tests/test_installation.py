"""What a release installs and imports, and what it does not."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dpq_core.errors import MissingExtraError
from dpq_core.recipe import ExecutionSection
from flows.cli.convnet import _run
from flows.running.runners import task_runner

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# Of `dpq --help`: nothing that computes, serves or talks to servers.
LATE_FOR_HELP = "torch numpy scipy transformers datasets prefect mlflow httpx filelock matplotlib"
# Of the start of a release. (accelerate itself imports boto3 where it is installed.)
LATE_FOR_RELEASE = (
    "dask distributed prefect_dask lm_eval datasets compressed_tensors s3fs matplotlib"
    " onnx onnxruntime onnxscript sklearn pandas torchao"
)
NOT_IN_A_RELEASE = (
    "dask distributed mypy moto playwright prefect-dask pytest ruff torchao triton hypothesis"
    " onnx onnxruntime onnxscript"
)


def imported_by(code, tmp_path):
    """Top-level packages that a process has when it ends."""
    told = f"{code}\nimport sys\nprint(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", told],
        env=os.environ | {"PYTHONPATH": str(ROOT), "DPQ_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}


def test_help_imports_nothing_that_computes(tmp_path):
    code = """
import sys
from flows.cli.main import main
sys.argv = ["dpq", "--help"]
try:
    main()
except SystemExit as end:
    assert end.code == 0
"""
    found = imported_by(code, tmp_path)
    assert {"typer", "flows", "dpq_core"} <= found
    assert not found & set(LATE_FOR_HELP.split())


def test_a_release_starts_without_what_comes_late_or_never(tmp_path):
    found = imported_by(
        "import flows.release.release, flows.running.runners, flows.cli.terminal", tmp_path
    )
    assert {"torch", "prefect", "transformers"} <= found
    assert not found & set(LATE_FOR_RELEASE.split())


def test_a_task_on_a_worker_imports_as_little(tmp_path):
    found = imported_by("import tasks.quantize, tasks.score, dpq_core.model.streaming", tmp_path)
    assert {"torch", "prefect", "transformers"} <= found
    assert not found & set(LATE_FOR_RELEASE.split())


def installed_by(requirements):
    """Names of the packages that an installation of these brings, themselves included."""
    found = set()
    waiting = [(Requirement(each), "") for each in requirements]
    while waiting:
        wanted, asked = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, asked) in found:
            continue
        found.add((name, asked))
        waiting += [(wanted, extra) for extra in wanted.extras if (name, extra) not in found]
        try:
            needed = [Requirement(each) for each in requires(name) or []]
        except PackageNotFoundError:
            continue  # of another platform
        here = [
            each for each in needed if not each.marker or each.marker.evaluate({"extra": asked})
        ]
        waiting += [(each, "") for each in here]
    return {name for name, _ in found}


def test_a_release_installs_nothing_that_only_tests_need():
    found = installed_by(PROJECT["dependencies"])
    assert {"torch", "mlflow", "lm-eval", "prefect", "s3fs"} <= found
    assert not found & set(NOT_IN_A_RELEASE.split())


def test_everything_that_is_installed_is_pinned():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    extras = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]
    direct = {
        canonicalize_name(Requirement(each).name) for each in [*PROJECT["dependencies"], *extras]
    }
    assert direct - {"dpq"} <= pinned


def test_a_feature_without_its_packages_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    said = re.escape("execution.runner: dask: the package prefect_dask is not installed")
    with pytest.raises(MissingExtraError, match=rf"{said}.*'\.\[dask\]'"):
        task_runner(ExecutionSection(runner="dask"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = r"dpq convnet: the package onnxruntime .*\[convnet\]"
    with pytest.raises(MissingExtraError, match=said):
        _run("convnet", None)
