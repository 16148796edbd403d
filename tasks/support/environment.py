"""What a run ran with: versions of code and packages, random seeds, the machine."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from dpq_core.digests import code_digest
from dpq_core.evaluation.suites import definitions
from dpq_core.kernels import products
from dpq_core.machine.device import resolve_device
from dpq_core.recipe import Recipe
from dpq_core.verdict import resampling

_PACKAGES = (
    "torch",
    "transformers",
    "lm-eval",
    "datasets",
    "numpy",
    "compressed-tensors",
    "mlflow",
    "prefect",
)


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that numbers depend on, and our own code (a digest)."""
    found = {"Python": platform.python_version(), "dpq_core": code_digest("dpq_core.pipeline")[:16]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def seeds(recipe: Recipe) -> dict[str, str]:
    """Seeds of all that draws random numbers in a release, and what draws none."""
    found = {
        "calibration windows": "none: evenly spaced over the data",
        "bootstrap of intervals": str(resampling.SEED),
    }
    if any(recipe.evaluation.num_fewshot.values()):
        found["few-shot examples"] = str(definitions.SEED)
    return found


def hardware(device_name: str) -> dict[str, str]:
    """The machine and the device that a recipe's name of one stands for here."""
    device = resolve_device(device_name)
    found = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "products": products.described(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "device": device.type,
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    """The model as Linux names it; platform knows the architecture alone there."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text("utf-8").splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
