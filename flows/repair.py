"""A rejected candidate gets more bits where they pay, until the gates pass or the budget is spent.

Every choice for every layer is quantized and its loss measured, once (`tasks.sensitivity`); the
knapsack picks the fewest bits whose predicted increase is below the limit (`dpq_core.allocation`);
the next candidate is made, and what it cost corrects the prediction. Nothing is computed twice:
layers come from the store.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dpq_core.allocation import (
    Allocation,
    AllocationError,
    Option,
    fewest_bytes,
    least_loss,
    loss_allowed,
    predicted_increase,
    total,
)
from dpq_core.choices import chosen_scheme
from dpq_core.gates import Metric
from dpq_core.linear import stored_bytes
from dpq_core.plan import PlannedLayer, plan_layers
from dpq_core.recipe import Recipe
from dpq_core.scores import PERPLEXITY
from dpq_core.streaming import StreamedModel
from flows.attempt import Attempt, attempt
from flows.quantize import Candidate
from tasks.evaluate import Measured
from tasks.preflight import Inputs
from tasks.progress import stepper
from tasks.quantize import quantize as quantize_layer
from tasks.sensitivity import Losses, sensitivity

OWN = "w4a8"  # the choice that changes nothing of the recipe's scheme
_AIM = 0.9  # of a limit: what the prediction is wrong by
_PROGRESS = 0.7  # of the last candidate's loss: what the next may have at most


@dataclass(frozen=True)
class Plan:
    """The next assignment: choices that differ from the recipe's scheme, by layer.

    needed: bits a weight that the limit is predicted to take; more than the budget where the plan
    is only the best within it.
    """

    layers: dict[str, str]
    predicted: float | None
    needed: float


def can_be_repaired(attempt: Attempt) -> bool:
    """Whether it was rejected, and more bits can help: nothing is broken but numbers."""
    sound = not any(attempt.candidate.integrity.values())
    metrics = attempt.verdict.metrics.values()
    missed = any(not metric.passed for metric in metrics)
    return sound and missed and not any(metric.wrong for metric in metrics)


def repair(recipe: Recipe, inputs: Inputs, baseline: Measured, first: Attempt) -> list[Attempt]:
    """The first attempt and those after it, until one passes, the rounds are spent, or a plan
    changes nothing any more; the last one's reasons say then what would have been needed."""
    attempts = [first]
    if not can_be_repaired(first):
        return attempts
    options = Options(recipe, inputs, first.candidate)
    step = stepper("repair", recipe.repair.max_rounds)
    for _ in range(recipe.repair.max_rounds):
        plan = options.plan(attempts[-1])
        if plan.layers == attempts[-1].recipe.layers:
            break
        changed = recipe.model_copy(update={"layers": plan.layers})
        stream = StreamedModel(inputs.model.folder)
        planned = replace(inputs, plan=plan_layers(stream, recipe.scheme, plan.layers))
        attempts.append(attempt(changed, planned, baseline, plan.predicted))
        step()
        if not can_be_repaired(attempts[-1]):
            return attempts
    last = attempts[-1]
    needed = options.plan(last).needed
    return [
        *attempts[:-1],
        last.because(
            f"repair: {len(attempts) - 1} rounds, up to {last.bits_per_weight:.2f} bits a weight;"
            f" {needed:.2f} are predicted to be needed, and repair.max_bits_per_weight is"
            f" {recipe.repair.max_bits_per_weight:g}"
        ),
    ]


class Options:
    """The options of a model's layers, measured, and the plans made from them."""

    def __init__(self, recipe: Recipe, inputs: Inputs, first: Candidate) -> None:
        self._recipe = recipe
        self._layers = {layer.name: layer for layer in inputs.plan.layers}
        self._weights = sum(layer.weights for layer in self._layers.values())
        self._losses = _measure_losses(recipe, inputs, first)
        self._options = {
            group: self._options_of(members) for group, members in self._groups().items()
        }

    def plan(self, attempt: Attempt) -> Plan:
        """The assignment to try after `attempt`."""
        now = total(self._options, self._choices_of(attempt.recipe))
        perplexity = attempt.verdict.metrics.get(PERPLEXITY)
        gain = _gain(perplexity, now.loss)
        most = self._loss_to_aim_at(attempt, now.loss, gain)
        budget = int(self._recipe.repair.max_bits_per_weight * self._weights / 8)
        try:
            wanted = fewest_bytes(self._options, most)
        except AllocationError:  # not even the best choices: as near as they come
            wanted = least_loss(self._options, 16 * self._weights)
        chosen = wanted if wanted.bytes <= budget else least_loss(self._options, budget)
        return Plan(
            layers=self._layers_of(chosen),
            predicted=None
            if perplexity is None or perplexity.baseline is None
            else predicted_increase(perplexity.baseline, chosen.loss, gain),
            needed=8 * wanted.bytes / self._weights,
        )

    def _loss_to_aim_at(self, attempt: Attempt, loss: float, gain: float) -> float:
        most = _PROGRESS * loss
        perplexity = attempt.verdict.metrics.get(PERPLEXITY)
        if perplexity is not None and not perplexity.passed:
            limit = _limit_left(perplexity, attempt.recipe)
            assert perplexity.baseline is not None
            most = min(most, loss_allowed(perplexity.baseline, _AIM * limit, gain))
        return most

    def _groups(self) -> dict[str, list[PlannedLayer]]:
        groups: dict[str, list[PlannedLayer]] = {}
        for layer in self._layers.values():
            together = self._recipe.repair.together
            groups.setdefault(layer.statistics if together else layer.name, []).append(layer)
        return groups

    def _options_of(self, members: list[PlannedLayer]) -> list[Option]:
        shared = set.intersection(*({*self._losses[layer.name]} for layer in members))
        return [
            Option(
                choice,
                sum(
                    stored_bytes(
                        layer.rows, layer.features, chosen_scheme(self._recipe.scheme, choice)
                    )
                    for layer in members
                ),
                sum(self._losses[layer.name][choice] for layer in members),
            )
            for choice in self._losses[members[0].name]
            if choice in shared
        ]

    def _choices_of(self, recipe: Recipe) -> dict[str, str]:
        return {
            group: recipe.layers.get(members[0].name, OWN)
            for group, members in self._groups().items()
        }

    def _layers_of(self, allocation: Allocation) -> dict[str, str]:
        return {
            layer.name: allocation.choices[group]
            for group, members in self._groups().items()
            for layer in members
            if allocation.choices[group] != OWN
        }


def _measure_losses(recipe: Recipe, inputs: Inputs, first: Candidate) -> Losses:
    """Every choice that goes with a layer, quantized and measured, block by block."""
    made = {
        layer.name: {
            choice: quantize_layer.submit(
                recipe, inputs.model, replaced, first.statistics[layer.statistics]
            )
            for choice, replaced in _alternatives(recipe, layer).items()
        }
        for layer in inputs.plan.layers
    }
    measured = []
    for block in range(inputs.plan.blocks):
        variants = {
            layer.name: {OWN: first.layers[layer.name]}
            | {choice: future.result() for choice, future in made[layer.name].items()}
            for layer in inputs.plan.of_block(block)
        }
        measured.append(
            sensitivity.submit(recipe, inputs.model, inputs.calibration, block, variants)
        )
    losses = {name: found for future in measured for name, found in future.result().items()}
    if "bf16" in recipe.repair.candidates:  # nothing is rounded: nothing is lost
        losses = {name: found | {"bf16": 0.0} for name, found in losses.items()}
    return losses


def _alternatives(recipe: Recipe, layer: PlannedLayer) -> dict[str, PlannedLayer]:
    """The layer under each candidate that goes with its width and differs from its own scheme."""
    found = {}
    for choice in recipe.repair.candidates:
        scheme = chosen_scheme(recipe.scheme, choice)
        fits = scheme.bits == 8 or layer.features >= scheme.group_size
        if choice != "bf16" and fits and scheme != layer.scheme:
            found[choice] = replace(layer, scheme=scheme)
    return found


def _gain(perplexity: Metric | None, loss: float) -> float:
    """What the measured increase makes of the losses' sum; 1 where nothing rose."""
    if perplexity is None or not perplexity.baseline or not perplexity.candidate or not loss:
        return 1.0
    rise = math.log(perplexity.candidate / perplexity.baseline)
    return rise / loss if rise > 0 else 1.0


def _limit_left(perplexity: Metric, recipe: Recipe) -> float:
    """The increase that passes: the limit, less what the interval adds where that is judged."""
    assert perplexity.limit is not None
    assert perplexity.baseline is not None
    limit = perplexity.limit
    if recipe.gates.mode == "relative":
        limit *= perplexity.baseline / 100
    if recipe.gates.confidence is not None and perplexity.interval and perplexity.delta is not None:
        limit -= perplexity.interval[1] - perplexity.delta
    return max(limit, 0.1 * perplexity.limit)


def round_rows(attempts: list[Attempt]) -> Iterator[dict[str, str | int | float | None]]:
    """The table of rounds: what each bit bought, and the prediction beside what was measured."""
    for number, each in enumerate(attempts):
        perplexity = each.verdict.metrics.get(PERPLEXITY)
        yield {
            "round": number,
            "bits per weight": each.bits_per_weight,
            "layers raised": len(each.recipe.layers),
            "predicted increase": each.predicted,
            "measured increase": perplexity.delta if perplexity else None,
            "verdict": each.verdict.verdict,
        }
