"""Better four bits: ideas for quantization, each alone and together, on a trained model.

    python tests/bench/four_bits.py RECIPE [--only NAME ...] [--seeds 2] [--windows N]

One row a variant: perplexity increase over the recipe's 16-bit model with its paired 95 % interval,
the interval of what it adds to the first variant's, what an equivalent 16-bit model (scaled,
rotated) itself differs by, and the mean over the layers of the relative output error. What did not
pay lives only here, in `prototypes.py` and in `transforms.py`.

    a  propagation of the quantized blocks, or of every quantized layer before a layer
    b  group scales refitted to fixed codes by least squares, then gradient rounding again
    c  the 16-bit model's output as target (GPTAQ, arXiv 2504.02692). cs: the writers' target
       includes what the stream lost before them
    d  channels scaled by rms(x)^α / rms(w)^β as in AWQ, folded into norm, v or up
    e  residual stream (r1) and values (r2) rotated
    f  activation ranges by the layers' output error
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transforms
from prototypes import (
    inputs_of,
    members_of,
    output_range,
    refit,
    restored,
    rotated,
    rounded,
    scaled,
    target_weight,
)
from transformers import AutoTokenizer

from dpq_core.arithmetic.formats import quantize
from dpq_core.calibration.statistics import InputRounding
from dpq_core.checkpoint.native import load_model
from dpq_core.data.texts import calibration_windows, load_texts, token_windows
from dpq_core.evaluation.perplexity import perplexity_token
from dpq_core.evaluation.scores import PERPLEXITY, Scores
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.objective import objective
from dpq_core.layer.quantize import quantize_layer
from dpq_core.layer.records import QuantizedLinear
from dpq_core.model.inputs import batches_of
from dpq_core.model.reader import read_config
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import Recipe, load_recipe
from dpq_core.recipe.scheme import Scheme
from dpq_core.verdict.pairing import difference

Transform = Callable[[transforms.Tensors, "Bench"], transforms.Tensors]


_AT_ONCE = 8  # scored windows


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe.

    propagation: `original`, `block` (the recipe's `quantized`), or `group`: the quantized linears
    that were before in the block feed those after them.
    refit: rounds of scales refitted to codes, then gradient rounding again.
    target: strength of the correction towards the 16-bit model's output on 16-bit inputs.
    stream: the same for what the residual stream lost before the layer that writes to it.
    """

    name: str
    scheme: dict[str, Any] = field(default_factory=dict)
    propagation: str = "original"
    refit: int = 0
    target: float = 0.0
    target_damp: float = 0.01
    stream: float = 0.0
    output_range: bool = False
    transform: Transform | None = None


@dataclass
class Bench:
    recipe: Recipe
    folder: Path
    most_windows: int
    first: Scores | None = None  # of the variants

    def __post_init__(self) -> None:
        section = self.recipe.evaluation.perplexity
        assert section is not None
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        texts = load_texts(section.dataset)
        self.windows = token_windows(texts, tokenizer, section.sequence_length)
        self.windows = self.windows[:: max(1, len(self.windows) // self.most_windows)]
        calibration = self.recipe.calibration
        self.tokens = calibration_windows(
            load_texts(calibration.dataset),
            tokenizer,
            calibration.samples,
            calibration.sequence_length,
        )
        self.baseline = self.score(load_model(self.folder))

    def score(self, model: Any) -> Scores:
        return perplexity_token(model, self.windows, _AT_ONCE)

    def run(self, variant: Variant) -> dict[str, Any]:
        start = time.monotonic()
        scheme = Scheme.model_validate(self.recipe.scheme.model_dump() | variant.scheme)
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.folder
            if variant.transform:
                tensors = variant.transform(transforms.read_tensors(folder), self)
                folder = Path(scratch)
                transforms.write_tensors(tensors, self.folder, folder, torch.bfloat16)
            layers, errors = quantize_model(self, folder, scheme, variant)
            model = load_model(folder)
        equivalent = self.score(model).value if variant.transform else self.baseline.value
        for name, layer in layers.items():
            linear = model.get_submodule(name)
            model.set_submodule(name, W4A8Linear(layer, linear.bias))
        found = self.score(model)
        paired = difference({PERPLEXITY: self.baseline}, {PERPLEXITY: found}, [PERPLEXITY])
        first = self.first or found
        against = difference({PERPLEXITY: first}, {PERPLEXITY: found}, [PERPLEXITY])
        self.first = first
        return {
            "increase": found.value - self.baseline.value,
            "interval": paired.interval,
            "against": against.interval,
            "equivalent": equivalent - self.baseline.value,
            "error": statistics.mean(errors),
            "seconds": time.monotonic() - start,
        }


def quantize_model(
    bench: Bench, folder: Path, scheme: Scheme, variant: Variant
) -> tuple[dict[str, QuantizedLinear], list[float]]:
    """Every layer, and the relative output error of each."""
    stream = StreamedModel(folder)
    section = bench.recipe.calibration
    rounding = InputRounding.of(scheme, section)
    sixteen = stream.begin(batches_of(bench.tokens, section.batch_size))
    hidden = sixteen
    if variant.propagation != "original":
        hidden = [batch.clone() for batch in sixteen]
    made: dict[str, QuantizedLinear] = {}
    errors: list[float] = []
    for block in range(stream.block_count):
        prefix = stream.block_name(block)
        groups = members_of(stream, block)
        firsts = [group[0] for group in groups]
        raw = inputs_of(stream, block, sixteen, {}, firsts)
        own = raw
        if variant.propagation == "block":
            own = inputs_of(stream, block, hidden, {}, firsts)
        done: dict[str, QuantizedLinear] = {}
        for group in groups:
            first = group[0]
            x16 = raw[first]
            x = own[first]
            if variant.propagation == "group":
                x = inputs_of(stream, block, hidden, done, [first])[first]
            weights = {m: stream.reader.tensor(f"{prefix}.{m}.weight").float() for m in group}
            found = InputStatistics.empty(x.shape[1])
            found.add_magnitudes(x)
            own_scale = None
            if variant.output_range and rounding:
                own_scale = output_range(x, list(weights.values()), found, rounding.inner)
                x8 = quantize(x, own_scale, rounding.inner) * own_scale
            else:
                x8 = x.float()
                if rounding:
                    x8 = rounded(rounding, x, found.magnitudes)
            found.add_hessian(x8)
            hessian = found.hessian()
            shift = 2 * (x16.float() - x8).T @ x8 / len(x8)
            for member, weight in weights.items():
                goal = weight
                if variant.target:
                    goal = target_weight(weight, hessian, shift, variant.target_damp)
                    goal = weight + variant.target * (goal - weight)
                if variant.stream and member in _WRITERS:
                    at = [_WRITERS[member]]
                    before = inputs_of(stream, block, sixteen, {}, at)[at[0]].float()
                    lost = before - inputs_of(stream, block, hidden, done, at)[at[0]]
                    moment = 2 * lost.T @ x8 / len(x8)
                    goal = goal + variant.stream * restored(moment, hessian, variant.target_damp)
                layer = quantize_layer(goal, found, scheme)
                if own_scale is not None:
                    layer = replace(layer, input_scale=own_scale)
                for _ in range(variant.refit):
                    layer = refit(goal, hessian, layer)
                residual = (layer.decoded() - goal).T.contiguous()
                errors.append(objective(residual, hessian) / objective(goal.T, hessian))
                done[f"{prefix}.{member}"] = layer
        if variant.propagation != "original":
            with stream.block(block, done):
                stream.advance(hidden)
        with stream.block(block):
            stream.advance(sixteen)
        made |= done
    return made, errors


_WRITERS = {
    "self_attn.o_proj": "input_layernorm",
    "mlp.down_proj": "post_attention_layernorm",
}
HESSIAN = {"scale_search": "hessian"}
SITES = {
    "q": ("q_proj",),
    "gate": ("gate_proj",),
    "o": ("o_proj",),
    "down": ("down_proj",),
    "all": ("q_proj", "o_proj", "gate_proj", "down_proj"),
}
ROTATED = {"r1": (True, False), "r2": (False, True), "r1+r2": (True, True)}  # stream, values


def variants(seeds: int) -> Iterator[Variant]:
    hessian = Variant("hessian", HESSIAN)
    group = replace(hessian, name="c group", target=1.0, propagation="group")
    stream = replace(group, name="cs", stream=1.0)
    yield Variant("rtn", {"method": "rtn", "rounding": "nearest"})
    yield Variant("dpq")
    yield hessian
    yield replace(hessian, name="a block", propagation="block")
    yield replace(hessian, name="a group", propagation="group")
    yield replace(hessian, name="b refit 1", refit=1)
    yield replace(hessian, name="b refit 4", refit=4)
    yield Variant("b refit 4 minmax", refit=4)
    yield replace(hessian, name="c original", target=1.0)
    yield replace(group, name="c block", propagation="block")
    yield group
    yield replace(group, name="c group damp .1", target_damp=0.1)
    yield replace(group, name="c group damp .001", target_damp=0.001)
    yield replace(group, name="c group half", target=0.5)
    yield stream
    yield replace(stream, name="cs half", stream=0.5)
    yield replace(stream, name="cs minmax", scheme={})
    for label, sites in SITES.items():
        yield replace(hessian, name=f"d {label}", transform=scaling(sites))
    for seed in range(seeds):
        for kind, turned in ROTATED.items():
            yield replace(hessian, name=f"e {kind} seed {seed}", transform=rotation(seed, *turned))
    yield replace(hessian, name="f percentile", scheme=HESSIAN | {"activation_range": "percentile"})
    yield replace(hessian, name="f mse", scheme=HESSIAN | {"activation_range": "mse"})
    yield replace(hessian, name="f output", output_range=True)
    yield replace(group, name="b+c group", refit=4)
    yield replace(stream, name="b+cs", refit=4)
    yield replace(group, name="c+d q", transform=scaling(SITES["q"]))
    yield replace(group, name="c+d all", transform=scaling(SITES["all"]))
    yield replace(group, name="c+e r1 seed 0", transform=rotation(0, *ROTATED["r1"]))
    for order in ("none", "gar"):
        for each in (hessian, group, replace(stream, name="b+cs", refit=4)):
            yield replace(each, name=f"{each.name} {order}", scheme=HESSIAN | {"order": order})


def scaling(sites: tuple[str, ...]) -> Transform:
    return lambda tensors, bench: scaled(tensors, bench.recipe, bench.tokens, sites)


def rotation(seed: int, stream: bool, values: bool) -> Transform:
    return lambda tensors, bench: rotated(
        tensors, transforms.Heads.of(read_config(bench.folder)), seed, stream, values
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="variants to run")
    parser.add_argument("--windows", type=int, default=1 << 20, help="of the evaluation's, spread")
    parser.add_argument("--seeds", type=int, default=2, help="of the rotations")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    known = {variant.name: variant for variant in variants(arguments.seeds)}
    if unknown := set(arguments.only) - set(known):
        parser.error(f"no variant {unknown.pop()!r}: known are {', '.join(known)}")
    torch.set_grad_enabled(False)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    bench = Bench(recipe, Path(recipe.model.id), arguments.windows)
    titles = ("variant", "increase", "95 %", "against the first", "16 bits", "error", "time")
    print(f"16 bits: {bench.baseline.value:.4f} over {len(bench.windows)} windows")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    for variant in [known[name] for name in arguments.only or known]:
        row = bench.run(variant)
        (low, high), (least, most) = row["interval"], row["against"]
        print(
            f"| {variant.name} | {row['increase']:+.4f} | {low:+.4f} … {high:+.4f} | "
            f"{least:+.4f} … {most:+.4f} | "
            f"{row['equivalent']:+.4f} | {row['error']:.5f} | {row['seconds']:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
