"""What a stage's content depends on besides its inputs: a part of every cache key.

    version     of the stage's own arithmetic, raised by hand, in the commit that changes a byte of
                what the stage makes (or of what it would find): never for a comment or a name
    libraries   whose versions change what is computed
    arithmetic  class of the processor's (`dpq_core.machine.device_kinds`), where one computes

`tests/flows/test_stages.py` holds every stage against golden bytes, and fails where these change
and the version does not. A stage is the name of a folder in the store, but for `perplexity` and
`suite`, which both make scores, and `statistics`, which covers `partial` and `hidden` too.
"""

import functools
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A row. libraries: as pip names them."""

    version: int
    libraries: tuple[str, ...] = ()


_FORWARD = ("torch", "transformers", "numba")  # a model's forward pass
_ANY = (*_FORWARD, "compressed-tensors")  # of a third party's checkpoint too

STAGES = {
    "model": Stage(1, ("transformers",)),  # what is checked of a checkpoint before it is named
    "statistics": Stage(1, _FORWARD),
    "layers": Stage(1, ("torch", "numba")),
    "checkpoints": Stage(1),
    "integrity": Stage(1, _FORWARD),
    "exports": Stage(2, _ANY),
    "requests": Stage(1, ("transformers", "tokenizers", "lm-eval")),
    "chunk-scores": Stage(3, _ANY),
    "last-states": Stage(3, _ANY),
    "divergences": Stage(3, _ANY),
    "divergence": Stage(3, _ANY),
    "perplexity": Stage(4, _ANY),
    "suite": Stage(4, (*_ANY, "lm-eval")),
    "sensitivity": Stage(4, _FORWARD),
    "images": Stage(2, ("datasets", "pillow", "scikit-learn")),
    "float-networks": Stage(2, ("torch", "transformers")),
    "classifiers": Stage(3, ("torch", "onnxscript")),
    "layer-losses": Stage(1, ("torch",)),
    "image-scores": Stage(3, ("onnxruntime",)),
}


def computed_by(stage: str, arithmetic: str | None = None) -> dict[str, Any]:
    """The part of a key. arithmetic: of the worker that computes; None where none does."""
    row = STAGES[stage]
    return {
        "stage": stage,
        "version": row.version,
        "libraries": {name: _installed(name) for name in row.libraries},
        "arithmetic": arithmetic,
    }


@functools.cache
def _installed(name: str) -> str | None:
    """An extra's packages may be missing."""
    try:
        return installed(name)
    except PackageNotFoundError:
        return None
