"""What vLLM's own code chooses for our exports on cards that nobody here has: the table in
docs/exports.md, which `DPQ_WRITE_DOCS=1` writes anew."""

import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpq_core.checkpoint.exports.compressed_tensors import COMPRESSED_TENSORS
from dpq_core.checkpoint.exports.gptq import layout_config
from dpq_core.checkpoint.exports.vllm import KERNELS, environment_of, kind_of, takes_fp8_inputs
from dpq_core.recipe.scheme import Scheme

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "exports.md"
CARDS = {
    "SM80": "Ampere",
    "SM89": "Ada",
    "SM90": "Hopper",
    "SM100": "Blackwell",
    "SM120": "Blackwell RTX",
}
FP8_INPUTS = "float8_e4m3fn"
WIDE_INPUTS = ("bfloat16", "float16")
LAYER, SIDE = "model.layers.0.mlp.down_proj", 4096
_TABLE = re.compile(r"(<!-- judged by vLLM [^>]*-->\n).*?(<!-- end -->)", re.DOTALL)


def config_of(scheme, form, layer=LAYER):
    """`quantization_config` as an export has it."""
    parsed = Scheme.model_validate(scheme)
    checkpoint = SimpleNamespace(
        scheme=parsed,
        schemes={layer: parsed},
        manifest={"skipped": ["lm_head"] if layer == LAYER else []},
        outside={layer: "" if layer == LAYER else "head"},
    )
    if form == "gptq":
        layout = layout_config(checkpoint)
        return {"quant_method": "gptq", "checkpoint_format": "gptq", **layout}
    return COMPRESSED_TENSORS.config(checkpoint)


@pytest.fixture(scope="module")
def judged(vllm_python, export_rows):
    """By card, by row: what the script of the peer's environment says."""
    cases = [
        {
            "name": f"{name}, {form}",
            "quantization_config": config_of(scheme, form),
            "rows": SIDE,
            "columns": SIDE,
            "environment": environment_of(Scheme.model_validate(scheme), form),
        }
        for name, (scheme, form) in export_rows.items()
    ]
    found = {card: asked(vllm_python, card, cases) for card in CARDS}
    for said in found.values():
        for name, (scheme, form) in export_rows.items():
            parsed, own = Scheme.model_validate(scheme), said[f"{name}, {form}"]
            own["rounds"] = form != "gptq" or takes_fp8_inputs(parsed)
            own["rounds"] &= parsed.activations != "none"
    return found


def asked(vllm_python, card, cases):
    """What the script says of a card, by the case's name."""
    done = subprocess.run(
        [vllm_python, str(HERE / "vllm_judgement.py"), card.removeprefix("SM")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def short(name):
    return name.removeprefix("CompressedTensors").removesuffix("LinearKernel")


def cell(said):
    if said["error"]:
        return "refused"
    inputs = ", FP8 inputs" * (said["inputs"] == FP8_INPUTS)
    inputs = inputs or ", 16-bit inputs" * other_inputs(said)
    kernel = f": {short(said['kernel'])}{inputs}" * bool(said["kernel"])
    return f"{short(said['scheme'])}{kernel}"


def other_inputs(said):
    """Whether a kernel multiplies inputs of 16 bits where those of eight were judged."""
    return said["rounds"] and said["inputs"] in WIDE_INPUTS


def table(judged):
    rows = ["| export | " + " | ".join(f"{c}, {n}" for c, n in CARDS.items()) + " |"]
    rows.append("|---" * (1 + len(CARDS)) + "|")
    for name in judged["SM80"]:
        cells = [cell(judged[card][name]) for card in CARDS]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def reasons(judged):
    """Why, each once, with the cards that it was said of."""
    said = {}
    for card, found in judged.items():
        for name, each in found.items():
            error = each["error"] and each["error"].split(": ", 1)[-1].split(" for layer_name")[0]
            for what, why in [(name, error)] if error else each["passed over"]:
                line = (short(what), " ".join(str(why).split()))
                if card not in said.setdefault(line, []):
                    said[line].append(card)
    return "\n".join(
        f"- {', '.join(cards)}: {what}: {why}" for (what, why), cards in sorted(said.items())
    )


def test_the_table_is_what_vllm_says(judged):
    text = PAGE.read_text("utf-8")
    drawn = f"\n{table(judged)}\n\nWhy not, in vLLM's words:\n\n{reasons(judged)}\n"
    new = _TABLE.sub(lambda m: f"{m[1]}{drawn}{m[2]}", text)
    if os.environ.get("DPQ_WRITE_DOCS"):
        PAGE.write_text(new, "utf-8")
    assert new == PAGE.read_text("utf-8")
    assert table(judged) in new


def test_the_model_card_names_what_vllm_chooses(judged, export_rows):
    for name, (scheme, form) in export_rows.items():
        parsed = Scheme.model_validate(scheme)
        if refused_everywhere(judged, f"{name}, {form}"):
            continue
        chosen = {}
        for card, kind in CARDS.items():
            said = judged[card][f"{name}, {form}"]
            if said["kernel"] and not other_inputs(said):
                chosen[kind] = short(said["kernel"])
        assert KERNELS.get(kind_of(parsed, form), {}) == chosen


def refused_everywhere(judged, row):
    return all(judged[card][row]["error"] for card in CARDS)


def test_the_kernels_that_our_presets_are_for(judged):
    """What the model card promises of vLLM."""
    hopper = judged["SM90"]["W4A8, preset hopper-vllm, compressed-tensors"]
    assert (hopper["scheme"], hopper["kernel"]) == (
        "CompressedTensorsW4A8Fp8",
        "CutlassW4A8LinearKernel",
    )
    assert {judged[card]["W8A8, INT8, compressed-tensors"]["scheme"] for card in CARDS} == {
        "CompressedTensorsW8A8Int8"
    }
    for card in CARDS:
        assert judged[card]["W4A16, symmetric, gptq"]["kernel"]
    for form in ("W4A8, preset ada-vllm, compressed-tensors", "W4A8, ada-vllm, gptq"):
        for card in ("SM89", "SM120"):
            said = judged[card][form]
            assert (short(said["kernel"]), said["inputs"]) == ("Marlin", FP8_INPUTS)
        assert "only support SM89 or SM12x" in judged["SM80"][form]["error"]


def test_a_quantized_head_is_taken_for_one(vllm_python, export_rows):
    """By its name: as one of all `Linear` it would be taken for 16 bits, without a word."""
    cases = [
        {
            "name": f"{name}, {form}",
            "quantization_config": config_of(scheme, form, "lm_head"),
            "module": "lm_head",
            "rows": 128_256,
            "columns": SIDE,
            "environment": environment_of(Scheme.model_validate(scheme), form),
        }
        for name, (scheme, form) in export_rows.items()
    ]
    unnamed = json.loads(json.dumps(cases[0])) | {"name": "unnamed"}
    groups = unnamed["quantization_config"]["config_groups"].values()
    for group in groups:
        group["targets"] = ["Linear"]
    said = asked(vllm_python, "SM90", [*cases, unnamed])
    assert said.pop("unnamed")["scheme"] is None
    assert any(each["scheme"] for each in said.values())
    for each in said.values():
        assert each["scheme"] or each["error"]  # a kernel, or a refusal, as for any layer
