"""Which kernel vLLM's own code chooses for a linear of an export, by the architecture of the card.

As vLLM 0.32.0 says when it is asked (`tests/peers/test_vllm_judgement.py` asks it, and holds this
table against it; docs/exports.md has it with the reasons). Its compiled library may still refuse.
"""

from collections.abc import Iterable

from dpq_core.checkpoint.exports.format import Target
from dpq_core.recipe.scheme import Scheme

_OTHERS = ("Ada", "Hopper", "Blackwell", "Blackwell RTX")
_MARLIN = {**dict.fromkeys(("Ampere", *_OTHERS), "Marlin"), "Hopper": "Machete"}

# A card that is not named is refused, or computes with other inputs than were judged. Blackwell is
# SM100, Blackwell RTX is SM120.
KERNELS: dict[str, dict[str, str]] = {
    "W4A8-FP8": {"Hopper": "CutlassW4A8"},
    "W4A8-FP8, weights not rounded": {"Ada": "Marlin", "Blackwell RTX": "Marlin"},
    "W8A8-FP8": {
        "Ampere": "MarlinFP8ScaledMM",
        **dict.fromkeys(_OTHERS, "CutlassFP8ScaledMM"),
    },
    "W8A8-INT8": dict.fromkeys(("Ampere", *_OTHERS), "CutlassInt8ScaledMM"),
    "W4A16": _MARLIN,
    "W8A16-INT8": _MARLIN,
}


def kind_of(scheme: Scheme, form: str) -> str | None:
    """The row of a layer; None: 16 bits."""
    if scheme.method == "none":
        return None
    if environment_of(scheme):
        return "W4A8-FP8, weights not rounded"
    number = "INT8" if scheme.inner == "int8" else "FP8"
    if form == "gptq" or scheme.inner == "none" or scheme.activations == "none":
        return "W4A16" if scheme.bits == 4 else f"W8A16-{number}"
    return f"W{scheme.bits}A8-{number}"


def environment_of(scheme: Scheme) -> dict[str, str]:
    """Variables that vLLM is to be run with, else it computes with other inputs than were judged:
    Marlin takes FP8 ones of files of W4A16, symmetric and in groups of 32, 64 or 128."""
    if scheme.inner == "none" and scheme.activations == "dynamic":
        return {"VLLM_MARLIN_INPUT_DTYPE": "fp8"}
    return {}


def shown_kernels(targets: Iterable[Target], form: str) -> str | None:
    """What vLLM would take for the layers of an export, in a line; None: nothing is known."""
    kinds = dict.fromkeys(kind_of(target.scheme, form) for target in targets)
    lines = []
    for kind in kinds:
        if kind not in KERNELS:
            continue
        cards: dict[str, list[str]] = {}
        for card, kernel in KERNELS[kind].items():
            cards.setdefault(kernel, []).append(card)
        takes = ", ".join(f"{kernel} on {' and '.join(names)}" for kernel, names in cards.items())
        lines.append(f"{kind}: {takes}")
    return "; ".join(lines) or None
