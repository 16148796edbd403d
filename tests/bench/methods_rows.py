"""The rows of `methods_table.py`, in order of value: a run that is cut off has the first of them.

methods   the table of the paper, with the product's default and presets (docs/results.md)
ideas     better four bits: each idea on top of the default, then several together
tokens    how much tokens count in Hessians, and from which texts they come
"""

from dataclasses import dataclass, replace
from typing import Any

from dpq_core.recipe.scheme import Scheme

OURS = "unit 0.125"  # the product's token_weights and first_token_share
SCORED = 1000  # first documents of a suite where a row is scored on them; of MMLU's subjects fewer
SUBJECTS = 25  # by this
EVERY = 1 << 30


_DEFAULT = Scheme()


@dataclass(frozen=True)
class Row:
    """A way to quantize, and what is measured of it.

    weighting: of tokens in H, see `why_tokens`.
    propagation: `original`; `block`, each block fed by the quantized ones before it; `group`, each
        group of linears by all that is quantized before it.
    text, scales_text: whose windows give Hessians, and static scales (the same where empty).
    refit: rounds of group scales refitted to codes. target: strength of the correction towards the
        16-bit model's outputs on its own inputs, stream: of what the residual stream lost
        (`prototypes`). output_range: static scales by the layers' output error.
    transform: an equivalent 16-bit model that is quantized instead, see `methods_transforms`.
    peer: another project's tool and its scheme, see `peer.py`; `scheme` says how inputs are rounded
        where the tool leaves a model with 16-bit ones.
    suites: first documents of each suite that are scored; 0: none.
    only: of one kind of model (`llama`).
    """

    name: str
    part: str = "methods"
    scheme: Scheme = _DEFAULT
    weighting: str = OURS
    propagation: str = "original"
    text: str = "c4"
    scales_text: str = ""
    refit: int = 0
    target: float = 0
    target_damp: float = 0.01
    stream: float = 0
    output_range: bool = False
    transform: str = ""
    peer: tuple[str, str] | None = None
    suites: int = 0
    only: str = ""

    @property
    def sixteen_bits(self) -> bool:
        return self.scheme.method == "none" and self.scheme.activations == "none"


def row(name: str, scheme: dict[str, Any] | None = None, **rest: Any) -> Row:
    return Row(name, scheme=Scheme(**scheme or {}), **rest)


W16 = {"inner": "none", "activations": "none"}
PLAIN = {"order": "none", "rounding": "nearest"}
RTN = {"method": "rtn", **PLAIN}
GPTQ = {"method": "gptq", **PLAIN, **W16}
PAPER = {"order": "gar", "rounding": "nearest"}  # the paper's own method
DYNAMIC = {"activations": "dynamic"}
HESSIAN = {"scale_search": "hessian"}
INT8 = {"inner": "int8", **DYNAMIC}

METHODS = (
    row("16 bits", {"method": "none", **W16}, suites=SCORED),
    row("rtn W4A8", RTN, suites=SCORED),
    row("paper: dpq gar nearest, plain H", PAPER, weighting="none", suites=SCORED),
    row("default", suites=SCORED),
    row("gptq W4A16, plain H", GPTQ, weighting="none", suites=SCORED),
    row("rtn W4A16", {**RTN, **W16}),
    row("default, hessian search", HESSIAN, suites=SCORED),
    row("gptq W4A16", GPTQ),
    row("paper: dpq gar nearest", PAPER),
    row("default, dynamic", DYNAMIC, suites=SCORED),
    row("W16A8, static", {"method": "none"}),
    row("W16A8, a token", {"method": "none", **DYNAMIC}),
    row("naive gar nearest", {"method": "naive", **PAPER}),
    row("dpq none nearest", PLAIN),
    row("dpq activation nearest", {"rounding": "nearest"}),
    row("dpq gar gradient", {"order": "gar"}),
    row("dpq none gradient", {"order": "none"}),
    row("hopper-vllm", {"preset": "hopper-vllm"}, suites=SCORED),
    row("gaudi-inc", {"preset": "gaudi-inc"}),
    row("rtn W4A8, dynamic", {**RTN, **DYNAMIC}),
    row("QServe-like: rtn int8, a token", {**RTN, **INT8}),
    row("QQQ-like: dpq int8, a token, nearest", {"rounding": "nearest", **INT8}),
    row("dpq int8, a token", INT8),
    row("default, mse search", {"scale_search": "mse"}),
    row("default, symmetric", {"symmetric": True}),
    row("default, group 32", {"group_size": 32}),
    row("W8A8", {"bits": 8}),
)


def idea(name: str, scheme: dict[str, Any] | None = None, **rest: Any) -> Row:
    return row(name, scheme, part="ideas", **rest)


GROUP = {"propagation": "group"}
ALL = "q_proj o_proj gate_proj down_proj"
IDEAS = (
    idea("a group by group", **GROUP),
    idea("c half", target=0.5, **GROUP),
    idea("b refit 2", refit=2),
    idea("d q/k/v scaled", transform="scaled q_proj"),
    idea("d all scaled (AWQ)", transform=f"scaled {ALL}"),
    idea("e values rotated", transform="rotated values 0"),
    idea("hessian, b", HESSIAN, refit=2),
    idea("cs half", target=0.5, stream=0.5, only="llama", **GROUP),
    idea("e stream rotated", transform="rotated stream 0", only="llama"),
    idea("f ranges by output", output_range=True),
    idea("ranges mse", {"activation_range": "mse"}),
    idea("b, c half", refit=2, target=0.5, **GROUP),
    idea("hessian, b, c half", HESSIAN, refit=2, target=0.5, **GROUP),
    idea("hessian, b, d q/k/v", HESSIAN, refit=2, transform="scaled q_proj"),
    idea(
        "hessian, b, c half, d q/k/v",
        HESSIAN, refit=2, target=0.5, transform="scaled q_proj", **GROUP,
    ),
    idea(
        "hessian, b, c half, d all",
        HESSIAN, refit=2, target=0.5, transform=f"scaled {ALL}", **GROUP,
    ),
    idea("hessian, b, c half, dynamic", HESSIAN | DYNAMIC, refit=2, target=0.5, **GROUP),
    idea("c whole", target=1.0, **GROUP),
    idea("c half, damping 0.1", target=0.5, target_damp=0.1, **GROUP),
    idea("a block by block", propagation="block"),
    idea("b refit 1", refit=1),
    idea("b refit 4", refit=4),
    idea("damping 0.03", {"damp_frac": 0.03}),
    idea("damping 0.1", {"damp_frac": 0.1}),
    idea("ranges percentile", {"activation_range": "percentile"}),
    idea("d all shifted", transform=f"shifted {ALL}"),
    idea("c half, d all", target=0.5, transform=f"scaled {ALL}", **GROUP),
    idea("c half, d all shifted", target=0.5, transform=f"shifted {ALL}", **GROUP),
    idea("hessian, c half", HESSIAN, target=0.5, **GROUP),
    idea("hessian, c half, d all", HESSIAN, target=0.5, transform=f"scaled {ALL}", **GROUP),
    idea("c half, dynamic", DYNAMIC, target=0.5, **GROUP),
    idea("hessian, c half, dynamic", HESSIAN | DYNAMIC, target=0.5, suites=SCORED, **GROUP),
)  # fmt: skip


def tokens(name: str, scheme: dict[str, Any] | None = None, **rest: Any) -> Row:
    return row(name, scheme, part="tokens", **rest)


TOKENS = (
    tokens("plain H", weighting="none"),
    tokens("equal norms", weighting="unit"),
    tokens("equal norms, first 0.03", weighting="unit 0.03"),
    tokens("equal norms, first 0.5", weighting="unit 0.5"),
    tokens("plain norms, first 0.125", weighting="first 0.125"),
    tokens("H of WikiText train", text="wiki"),
    tokens("H of WebQuestions", text="questions", scales_text="c4"),
    tokens("scales of WebQuestions", scales_text="questions"),
    tokens("both of WebQuestions", text="questions"),
    tokens("equal norms, first 0.25", weighting="unit 0.25"),
    tokens("equal norms, first 0.06", weighting="unit 0.06"),
)


# Groups of 64 divide SmolLM2's widths, which peers want; Gemma's are divided by 128 as well.
def beside(name: str, scheme: dict[str, Any] | None = None, **rest: Any) -> Row:
    """A row of ours with the groups of peers' rows."""
    scheme = {"group_size": 64, **(scheme or {})}
    return row(f"{name}, group 64", scheme, part="peers", **rest)


def peer(name: str, tool: str, scheme: str, own: dict[str, Any] | None = None) -> tuple[Row, ...]:
    own = own or {"method": "none", **W16}
    kinds = (("llama", "/64", ", group 64"), ("gemma", "", ""))
    return tuple(
        row(
            name + title, {"group_size": 64 if size else 128, **own},
            part="peers", peer=(tool, scheme + size), only=only, suites=EVERY,
        )
        for only, size, title in kinds
    )  # fmt: skip


ROUNDED = {"method": "none", **DYNAMIC}
PEERS = (
    *peer("llm-compressor AWQ W4AFP8", "llm-compressor-awq", "W4AFP8"),
    *peer("AutoRound W4A16, inputs in FP8", "auto-round-200", "W4A16", ROUNDED),
    *peer("llm-compressor GPTQ W4AFP8", "llm-compressor", "W4AFP8"),
    beside("default", suites=EVERY),
    beside("hessian, c half, dynamic", HESSIAN | DYNAMIC, target=0.5, suites=EVERY, **GROUP),
    beside("paper: dpq gar nearest, plain H", PAPER, weighting="none"),
    beside("rtn W4A8", RTN),
    beside("rtn W4A8, dynamic", RTN | DYNAMIC),
    *peer("AutoRound light W4A16, inputs in FP8", "auto-round", "W4A16", ROUNDED),
    *peer("llm-compressor GPTQ W4A16", "llm-compressor", "W4A16"),
)

# Methods that decide first; then ideas and tokens by turns with the rest.
_FIRST, _REST = METHODS[:10], METHODS[10:]
ROWS = {
    each.name: each
    for each in (*_FIRST, *IDEAS[:6], *TOKENS[:5], *_REST[:10], *IDEAS[6:17], *TOKENS[5:9],
                 *_REST[10:], *IDEAS[17:], *TOKENS[9:], *PEERS)
}  # fmt: skip
QUICK = "16 bits", "rtn W4A8", "default"
# Documents all, of what the claims rest on; the best row is found among those that are there.
FULL = (
    "16 bits", "hessian, c half, dynamic", "default", "paper: dpq gar nearest, plain H",
)  # fmt: skip


def full(name: str, found: Row) -> Row:
    """A row scored on all documents of the suites."""
    return replace(found, name=name, suites=EVERY)
