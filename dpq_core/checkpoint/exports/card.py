"""The model card: README.md of a native checkpoint or an export, from its manifest."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dpq_core.checkpoint.bytes_by_part import bytes_by_part
from dpq_core.checkpoint.exports.compressed_tensors import vllm_obstacle
from dpq_core.checkpoint.exports.format import targets_of
from dpq_core.checkpoint.exports.vllm import environment_for, shown_kernels, takes_fp8_inputs
from dpq_core.checkpoint.native import MANIFEST, QuantizedCheckpoint
from dpq_core.digests import file_digest
from dpq_core.recipe.scheme import Scheme

CARD = "README.md"
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_LICENCE = ("license", "license_name", "license_link")
_TITLES = {"native": "W4A8 by Dual Precision Quantization"}
_USES = {
    "native": (
        "With `dpq` installed, in transformers:\n\n```python\n"
        "from dpq_core.checkpoint.native import load_quantized\n\n"
        'model = load_quantized("…")  # this folder\n```'
    ),
    "compressed-tensors": (
        "With `transformers` and `compressed-tensors` installed:\n\n```python\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("…")  # this folder\n```'
    ),
    "gptq": (
        "A GPTQ file of W4A16, for loaders of that format. It was read back by dpq alone: no "
        "runtime was tried."
    ),
    "inc": (
        "For Intel Neural Compressor on Gaudi (`load(…, format='huggingface', device='hpu')`), "
        "which measures the activations' scales itself. Not tried on Gaudi."
    ),
    "fp8_to_int": "For Intel Neural Compressor on Gaudi, as AutoRound writes it. Not tried there.",
}


def licence_of(folder: Path) -> dict[str, str]:
    """What the card of a model says of its licence; empty where it says nothing."""
    path = folder / CARD
    found = _FRONT_MATTER.match(path.read_text("utf-8")) if path.is_file() else None
    if found is None:
        return {}
    try:
        content = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}
    content = content if isinstance(content, dict) else {}
    return {key: str(content[key]) for key in _LICENCE if content.get(key)}


def model_card(
    checkpoint: QuantizedCheckpoint,
    export: Mapping[str, Any] | None = None,
    verdict: str | None = None,
    gates: Sequence[Mapping[str, str]] = (),
    standings: str = "",
    attested: str | None = None,
) -> str:
    """README.md of a native checkpoint, or of its export where `export` is that one's manifest.

    gates: the rows of the gate table, as they are shown. standings: how they came out, in a line.
    attested: what was found of an engine that served it, in a line.
    """
    native = checkpoint.manifest
    name = export["format"] if export else "native"
    base = {"id": "unknown", "digest": "", **(native.get("base_model") or {})}
    licence = base.get("licence") or {}
    front = {**licence, "base_model": base["id"], "library_name": "transformers"}
    bits = export["bits_per_weight"] if export else 8 * native["bytes_per_weight"]
    card: str = _template().render(
        front=front,
        base=base | {"license": licence.get("license")},
        title=_TITLES.get(name, name),
        verdict=verdict,
        bits=bits,
        scheme=shown_scheme(checkpoint.scheme),
        cache=shown_cache(native),
        calibration=_calibration(native.get("calibration") or {}),
        format=name,
        digest=file_digest(checkpoint.folder / MANIFEST),
        layers=_layer_rows(checkpoint),
        parts=shown_parts(bytes_by_part(checkpoint, export)),
        skipped=list(native["skipped"]),
        given=_given(native),
        gates=list(gates),
        standings=f" {standings[:1].upper()}{standings[1:]}." if standings else "",
        uses=_uses(name, checkpoint),
        checks=export["checks"] if export else {},
        attested=attested,
        reader=export["reader"] if export else "",
        distance=export["distance"] if export else None,
        tolerance=export["tolerance"]["logits"] if export else 0,
        reason=export["tolerance"]["reason"] if export else "",
        files=(export or native)["files"],
    )
    return card


def shown_scheme(scheme: Scheme) -> str:
    """A scheme in a line."""
    if scheme.method == "none":
        return "16 bits"
    inner = {"e4m3": f"E4M3 up to {scheme.fp8_max}", "int8": "INT8", "none": "16 bits"}
    if takes_fp8_inputs(scheme):
        inner["none"] = f"{inner['e4m3']} by codes, weights not rounded"
    weights = "8 bits, a scale a row"
    if scheme.bits == 4:
        kind = "symmetric" if scheme.symmetric else "asymmetric"
        weights = f"4 bits, {kind} groups of {scheme.group_size}"
    parts = [scheme.method, weights, f"arithmetic in {inner[scheme.inner]}"]
    if scheme.activations != "none":
        parts.append(f"{scheme.activations} activations")
    return ", ".join(parts)


def cache_bytes(manifest: Mapping[str, Any]) -> int | None:
    """Bytes that the keys and values of a token take in FP8, half of what 16 bits take. None: the
    checkpoint keeps them in 16 bits."""
    shapes = manifest.get("kv_cache")
    return shapes and sum(heads * size for each in shapes.values() for heads, size in each)


def shown_cache(manifest: Mapping[str, Any]) -> str | None:
    """The FP8 cache of a checkpoint in a line."""
    if (taken := cache_bytes(manifest)) is None:
        return None
    per = {"tensor": "a layer", "head": "a head"}[manifest["scheme"]["kv_cache_scale"]]
    return f"FP8 (E4M3), a scale {per}: {taken:,} bytes a token, of {2 * taken:,} in 16 bits"


def _layer_rows(checkpoint: QuantizedCheckpoint) -> list[dict[str, Any]]:
    """How many layers have which scheme, and the bits that they take in the native checkpoint."""
    shown = {name: shown_scheme(scheme) for name, scheme in checkpoint.schemes.items()}
    stored: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for row in checkpoint.manifest["layers"]:
        stored[shown[row["name"]]] += row["bytes"]
        weights[shown[row["name"]]] += row["shape"][0] * row["shape"][1]
    return [
        {"count": count, "scheme": scheme, "bits": 8 * stored[scheme] / weights[scheme]}
        for scheme, count in Counter(shown.values()).most_common()
    ]


def _given(native: Mapping[str, Any]) -> str:
    """Where codes were kept: how far layers are from the given ones."""
    errors = [row["error"] for row in native["layers"] if row.get("given_error") is not None]
    if not errors:
        return ""
    stored_as = native.get("base_model", {}).get("stored_as", "4 bits")
    return (
        f"{stored_as}; its codes are kept in {len(errors)} layers, whose outputs differ from its "
        f"own by up to {max(errors):.2g} (relative squared error, 8-bit inputs apart)"
    )


def shown_parts(bytes_by_part: Mapping[str, int]) -> list[dict[str, str]]:
    """A row a part: its bytes, and their share of all."""
    whole = sum(bytes_by_part.values())
    return [
        {"part": part, "bytes": f"{size:,}", "share": f"{size / whole:.1%}"}
        for part, size in bytes_by_part.items()
    ]


def _calibration(about: Mapping[str, Any]) -> str:
    if "samples" not in about:
        return "not recorded"
    share = about.get("correction")
    corrected = f" with a correction of {share:g}" if share else ""
    return (
        f"{about['samples']} windows of {about['sequence_length']} tokens, "
        f"{about['propagation']} propagation{corrected}, "
        f"windows' digest `{about.get('windows', '')[:16]}`"
    )


def _uses(name: str, checkpoint: QuantizedCheckpoint) -> list[str]:
    uses = [_USES[name]]
    if name == "compressed-tensors":
        obstacle = vllm_obstacle(targets_of(checkpoint))
        uses.append(f"Not for vLLM: {obstacle}." if obstacle else _served(checkpoint, name))
        return uses if obstacle else [*uses, *_kernels(name, checkpoint)]
    if name == "gptq":
        four = [t.scheme for t in targets_of(checkpoint) if t.scheme.method != "none"]
        if all(scheme.symmetric for scheme in four):
            fp8 = any(map(takes_fp8_inputs, four))
            uses.append(_served(checkpoint, name) if fp8 else _ON_CPU)
            return [*uses, *_kernels(name, checkpoint)]
        uses.append("Not for vLLM: it takes symmetric GPTQ files alone (scheme.symmetric: true).")
    return uses


_ON_CPU = (
    "On a CPU with AMX set `VLLM_CPU_INT4_W4A8=0`: vLLM rounds inputs to INT8 there where nobody "
    "says no, and this was judged with inputs in 16 bits."
)


def _served(checkpoint: QuantizedCheckpoint, name: str) -> str:
    """The command that serves it with vLLM, and where."""
    variables = environment_for(targets_of(checkpoint), name)
    if "VLLM_MARLIN_INPUT_DTYPE" not in variables:
        plain = (
            "With vLLM, on hardware that has its kernels (four-bit weights with FP8 activations: "
            "Hopper):\n\n```sh\nvllm serve …  # this folder\n```"
        )
        return f"{plain}\n\n{_ON_CPU}" if variables else plain
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    return (
        "With vLLM, on Ada (SM89) and GeForce and RTX Blackwell (SM12x), as it was judged:\n\n"
        f"```sh\n{settings} vllm serve …  # this folder\n```\n\nWithout the variable, and on "
        "cards that refuse it (Ampere, Hopper, SM100), it is W4A16: inputs stay in 16 bits."
    )


def _kernels(name: str, checkpoint: QuantizedCheckpoint) -> list[str]:
    """Which kernels vLLM would take."""
    kernels = shown_kernels(targets_of(checkpoint), name)
    return [f"By vLLM 0.32's own code, not tried on such cards: {kernels}."] if kernels else []


def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=loader,
        undefined=StrictUndefined,
        autoescape=False,  # Markdown
        keep_trailing_newline=True,
    ).get_template("card.md.jinja")
