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
    if takes_fp8_inputs(scheme):
        return "W4A8-FP8, weights not rounded"
    number = "INT8" if scheme.inner == "int8" else "FP8"
    if form == "gptq" or scheme.inner == "none" or scheme.activations == "none":
        return "W4A16" if scheme.bits == 4 else f"W8A16-{number}"
    return f"W{scheme.bits}A8-{number}"


def takes_fp8_inputs(scheme: Scheme) -> bool:
    """Whether a file of W4A16 was judged with FP8 inputs."""
    return scheme.inner == "none" and scheme.activations == "dynamic"


def environment_of(scheme: Scheme, form: str) -> dict[str, str]:
    """Variables that vLLM is to be run with, else it computes with other inputs than were judged.

    Of files of W4A16 Marlin takes FP8 inputs (symmetric, groups of 32, 64 or 128), and on a CPU
    with AMX all are rounded to INT8 where nobody says no.
    """
    if takes_fp8_inputs(scheme):
        return {"VLLM_MARLIN_INPUT_DTYPE": "fp8"}
    four = scheme.bits == 4 and scheme.method != "none"
    if four and (form == "gptq" or scheme.activations == "none"):
        return {"VLLM_CPU_INT4_W4A8": "0"}
    return {}


def environment_for(targets: Iterable[Target], form: str) -> dict[str, str]:
    """Of all layers of an export."""
    found: dict[str, str] = {}
    for target in targets:
        found |= environment_of(target.scheme, form)
    return found


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
