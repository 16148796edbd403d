"""Flows by their names, imported when one is asked for: Prefect takes seconds to import, and
neither a bad recipe nor who deploys has to wait for it."""

from importlib import import_module
from typing import Any

_MODULES = {
    "benchmark": "flows.benchmark",
    "compare": "flows.compare",
    "evaluate": "flows.evaluate",
    "quantize": "flows.quantize",
    "release": "flows.release.release",
}


def flow_named(name: str) -> Any:
    """The flow: a function, with Prefect's `with_options` and `fn`."""
    return getattr(import_module(_MODULES[name]), name)
