"""dpq_core stands alone, and importing it does nothing. Each check has a process of its own."""

import os
import subprocess
import sys
from collections import Counter

from house import ROOT, TOP, picture

PAGE = ROOT / "docs/architecture.md"
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "dpq_core").rglob("[!_]*.py"))
]

QUANTIZE_A_LAYER = """
import importlib, sys

blocked = ("prefect", "mlflow", "infra", "tasks", "flows")
sys.modules.update(dict.fromkeys(blocked))  # None: importing them, or a part of them, fails
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not [name for name in sys.modules if name.startswith(tuple(f"{b}." for b in blocked))]

import torch
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.quantize import quantize_layer
from dpq_core.recipe.scheme import Scheme

x = torch.randn(64, 32)
statistics = InputStatistics.empty(32)
statistics.add_hessian(x)
statistics.add_magnitudes(x)
layer = quantize_layer(torch.randn(8, 32), statistics, Scheme(group_size=16))
assert 0 < layer.report.error < 0.1, layer.report
print("quantized")
"""

SIDE_EFFECTS = """
import importlib, os, sys
import numpy, torch

def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "torch rng": torch.get_rng_state().numpy().tobytes(),
        "numpy rng": str(numpy.random.get_state()),
        "folder": os.getcwd(),
    }

torch.set_num_threads(3)
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    changed = [key for key, value in state().items() if value != before[key]]
    assert not changed, f"importing {name} changed {changed}"
print("unchanged")
"""


def run(script, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script, *MODULES],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_dpq_core_quantizes_a_layer_without_what_is_above_it(tmp_path):
    result = run(QUANTIZE_A_LAYER, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().endswith("quantized")


def test_importing_has_no_side_effects(tmp_path):
    assert "dpq_core.layer.quantize" in MODULES
    result = run(SIDE_EFFECTS, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().endswith("unchanged")
    assert not list(tmp_path.iterdir())


def test_the_picture_is_drawn_from_the_imports():
    """`DPQ_WRITE_DOCS=1` draws it."""
    before, _, rest = PAGE.read_text("utf-8").partition("<!-- drawn by tests/house.py -->\n")
    _, _, after = rest.partition("<!-- end -->")
    drawn = f"{before}<!-- drawn by tests/house.py -->\n{picture()}\n<!-- end -->{after}"
    if os.environ.get("DPQ_WRITE_DOCS"):
        PAGE.write_text(drawn, "utf-8")
    assert PAGE.read_text("utf-8") == drawn, "stale: DPQ_WRITE_DOCS=1 draws it"


def test_files_of_tests_have_names_of_their_own():
    """pytest takes one of those with the same name, and only says so where both are asked for."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    twice = {name for name, count in names.items() if count > 1}
    assert names["test_architecture.py"] == 1
    assert twice <= {"__init__.py", "conftest.py"}


def test_modules_are_short():
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines())
        for top in TOP
        for path in (ROOT / top).rglob("*.py")
    }
    assert len(lines) > 200
    assert {path: count for path, count in lines.items() if count > 400} == {}
