"""What a layer can be given instead of the recipe's scheme: a row a choice.

A choice changes fields of the recipe's scheme; all else (method, order, activations, …) stays. Bits
count what is stored: codes, scales and zero points.
"""

from typing import Any

from dpq_core.recipe.scheme import Scheme

CHOICES: dict[str, dict[str, Any]] = {
    "w4a8": {},
    "w4a8-g64": {"group_size": 64},
    "w4a8-g32": {"group_size": 32},
    "w8a8": {"bits": 8},
    "w8a8-int8": {"bits": 8, "inner": "int8"},
    "w8a16": {"bits": 8, "inner": "int8", "activations": "none"},
    "bf16": {"method": "none", "bits": 4, "inner": "none", "activations": "none"},
}


def chosen_scheme(scheme: Scheme, choice: str) -> Scheme:
    """The recipe's scheme as `choice` changes it.

    Raises:
        ValueError: no such choice, or one that does not go with the scheme.
    """
    if choice not in CHOICES:
        raise ValueError(f"{choice!r} is no choice for a layer: there are {', '.join(CHOICES)}")
    changes = dict(CHOICES[choice])
    if changes.get("bits") == 8 and scheme.inner == "none" and scheme.input_format:
        changes = {"inner": "e4m3", **changes}  # as the inputs are: preset ada-vllm
    if scheme.method == "gptq" and changes.get("inner") == "int8":
        changes["method"] = "rtn"  # as every method rounds eight bits, and gptq knows none inside
    return Scheme.model_validate({**scheme.model_dump(), **changes})
