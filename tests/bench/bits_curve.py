"""Perplexity increase against bits per weight: assignments by plan, at random, and by position.

    python tests/bench/bits_curve.py RECIPE [--bits 4.5 5 6 7 8] [--draws 20] [--plot FILE]
                                            [--ladder FILE]

Every choice of `repair.candidates` is quantized and measured once for every layer. Then, for each
number of bits: the planned assignment (least loss within it), eight bits for as many layers drawn
at random as the bits allow, and for the first and last blocks first. All are scored on the recipe's
perplexity data. `--ladder`, the output of `dpq compare RECIPE --json`, is drawn beside them.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from dpq_core.calibration.statistics import InputRounding, TokenWeights, calibrate_block
from dpq_core.checkpoint.native import load_model
from dpq_core.data.texts import calibration_windows, load_texts, token_windows
from dpq_core.evaluation.perplexity import perplexity_token
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import quantize_layer
from dpq_core.layer.records import QuantizedLinear
from dpq_core.layer.storage import stored_bytes
from dpq_core.model.inputs import batches_of
from dpq_core.model.plan import PlannedLayer, plan_layers
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import Recipe, load_recipe
from dpq_core.recipe.layer_choices import chosen_scheme
from dpq_core.repair.allocation import Option, least_loss, predicted_increase, total
from dpq_core.repair.sensitivity import Trial, block_losses

OWN = "w4a8"
WINDOWS_AT_ONCE = 8
Made = dict[str, dict[str, QuantizedLinear]]  # layer → choice → quantized


def quantize_all(
    recipe: Recipe, folder: Path
) -> tuple[list[PlannedLayer], Made, dict[Trial, float]]:
    """Every layer under every choice, and the loss of each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    section = recipe.calibration
    texts = load_texts(section.dataset)
    windows = calibration_windows(texts, tokenizer, section.samples, section.sequence_length)
    stream = StreamedModel(folder)
    plan = plan_layers(stream, recipe.scheme)
    rounding = InputRounding.of(recipe.scheme, section)
    batches = stream.begin(batches_of(windows, section.batch_size))
    few = -(-recipe.repair.samples // section.batch_size)  # batches
    made: Made = {}
    losses: dict[Trial, float] = {}
    for block in range(plan.blocks):
        before = [batch.clone() for batch in batches[:few]]
        found = calibrate_block(
            stream, block, batches, rounding, TokenWeights.of(section), advance=True
        )
        trials = dict[Trial, QuantizedLinear]()
        for layer in plan.of_block(block):
            weight = stream.reader.tensor(f"{layer.name}.weight")
            made[layer.name] = {}
            for choice in (OWN, *recipe.repair.candidates):
                scheme = chosen_scheme(recipe.scheme, choice)
                if scheme.bits == 4 and layer.features < scheme.group_size:
                    continue
                made[layer.name][choice] = quantize_layer(weight, found[layer.statistics], scheme)
                trials[Trial(layer.name, choice)] = made[layer.name][choice]
        loaders: dict[Trial, Callable[[], QuantizedLinear]] = {
            trial: lambda each=each: each for trial, each in trials.items()
        }
        losses |= block_losses(stream, block, before, loaders)
        print(f"block {block + 1} of {plan.blocks} measured", flush=True)
    return list(plan.layers), made, losses


def increases(
    recipe: Recipe, folder: Path, made: Made
) -> tuple[float, Callable[[dict[str, str]], float]]:
    """The 16-bit perplexity, and a function from an assignment to what it adds."""
    section = recipe.evaluation.perplexity
    assert section is not None
    texts = load_texts(section.dataset)
    windows = token_windows(texts, AutoTokenizer.from_pretrained(folder), section.sequence_length)
    model = load_model(folder)
    linears = {name: model.get_submodule(name) for name in made}
    baseline = perplexity_token(model, windows, WINDOWS_AT_ONCE).value

    def increase(choices: dict[str, str]) -> float:
        for name, choice in choices.items():
            model.set_submodule(name, W4A8Linear(made[name][choice], linears[name].bias))
        return perplexity_token(model, windows, WINDOWS_AT_ONCE).value - baseline

    return baseline, increase


def raised(
    options: dict[str, list[Option]], order: list[str], choice: str, budget: int
) -> dict[str, str]:
    """`choice` for as many layers, in this order, as the budget allows."""
    choices = dict.fromkeys(options, OWN)
    for name in order:
        tried = choices | {name: choice}
        if total(options, tried).bytes <= budget:
            choices = tried
    return choices


def by_position(layers: list[PlannedLayer]) -> list[str]:
    """First and last blocks first."""
    last = layers[-1].block
    order = sorted(layers, key=lambda layer: (min(layer.block, last - layer.block), layer.block))
    return [layer.name for layer in order]


def curve(recipe: Recipe, bits: list[float], draws: int) -> Iterator[dict[str, Any]]:
    folder = Path(recipe.model.id)
    layers, made, losses = quantize_all(recipe, folder)
    baseline, increase = increases(recipe, folder, made)
    weights = sum(layer.weights for layer in layers)
    options = {
        layer.name: [
            Option(
                choice,
                stored_bytes(layer.rows, layer.features, chosen_scheme(recipe.scheme, choice)),
                losses[Trial(layer.name, choice)],
            )
            for choice in made[layer.name]
        ]
        for layer in layers
    }
    names = [layer.name for layer in layers]
    rng = random.Random(0)
    own = total(options, dict.fromkeys(options, OWN))
    gains: list[float] = []
    for wanted in [8 * own.bytes / weights, *bits]:
        budget = round(wanted * weights / 8)
        if budget < own.bytes:
            continue
        plan = least_loss(options, budget)
        measured = increase(plan.choices)
        if not gains:  # as repair does: the first candidate tells what losses add up to
            gains.append(math.log1p(measured / baseline) / plan.loss)
        row: dict[str, Any] = {
            "bits": 8 * plan.bytes / weights,
            "predicted": predicted_increase(baseline, plan.loss, gains[0]),
            "planned": measured,
        }
        if budget > own.bytes:
            row["position"] = increase(raised(options, by_position(layers), "w8a8", budget))
            found = [
                increase(raised(options, rng.sample(names, len(names)), "w8a8", budget))
                for _ in range(draws)
            ]
            row |= {"random": statistics.mean(found), "best random": min(found)}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5, 6, 7, 8])
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--ladder", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    rows = []
    titles = ("bits", "predicted", "planned", "position", "random", "best random")
    for row in curve(recipe, arguments.bits, arguments.draws):
        rows.append(row)
        print(
            "| " + " | ".join(f"{row[t]:.4f}" if t in row else "" for t in titles) + " |",
            flush=True,
        )
    if arguments.plot:
        ladder = json.loads(arguments.ladder.read_text())["rows"] if arguments.ladder else []
        draw(rows, ladder).savefig(arguments.plot, bbox_inches="tight", dpi=120)


def draw(rows: list[dict[str, Any]], ladder: list[dict[str, Any]]) -> Figure:
    """Curves of the assignments, and the methods of a ladder as points with names."""
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot(xlabel="bits per weight", ylabel="perplexity increase")
    for title in ("planned", "predicted", "position", "random", "best random"):
        points = [(row["bits"], row[title]) for row in rows if title in row]
        axes.plot(*zip(*points, strict=True), ":" if title == "predicted" else "o-", label=title)
    methods = [row for row in ladder if row["increase"] is not None and row["bits_per_weight"] < 16]
    for row in methods:
        axes.plot(row["bits_per_weight"], row["increase"], "k_")
        axes.annotate(row["variant"], (row["bits_per_weight"], row["increase"]), fontsize=6)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
