"""What each layer could be given, measured; and the next assignment made from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dpq_core.evaluation.scores import PERPLEXITY
from dpq_core.evaluation.text_divergence import DIVERGENCE
from dpq_core.layer.storage import stored_bytes
from dpq_core.model.plan import PlannedLayer
from dpq_core.recipe import Recipe
from dpq_core.repair.allocation import (
    Allocation,
    AllocationError,
    Option,
    fewest_bytes,
    least_loss,
    loss_allowed,
    predicted_increase,
    total,
)
from dpq_core.verdict.standing import Metric
from flows.quantize import Candidate
from flows.release.candidate import Attempt
from tasks.preflight import Inputs
from tasks.quantize import quantize as quantize_readers
from tasks.sensitivity import Cost, Costs, sensitivity
from tasks.support.progress import stepper
from tasks.support.work import readers_of

OWN = "w4a8"  # the choice that changes nothing of the recipe's scheme
_AIM = 0.9  # of a limit: what the prediction is wrong by
_PROGRESS = 0.7  # of the last candidate's loss: what the next may have at most


@dataclass(frozen=True)
class Assignment:
    """What to try next: choices that differ from the recipe's scheme, by layer.

    needed: bits a weight that the limit is predicted to take; more than the budget where the
    assignment is only the best within it.
    """

    layers: dict[str, str]
    predicted: float | None
    needed: float


class Options:
    """The choices of a model's layers, and assignments made from them. Layers that the recipe
    itself gives a choice keep it, but for a head or an embedding that it gives the scheme's own:
    this is what asks for them to be quantized at all."""

    def __init__(self, recipe: Recipe, inputs: Inputs, first: Candidate) -> None:
        self._recipe = recipe
        self._layers = {
            layer.name: layer
            for layer in inputs.plan.layers
            if layer.name not in recipe.layers
            or (layer.outside and recipe.layers[layer.name] == OWN)
        }
        self._costs = _measure(recipe, inputs, list(self._layers.values()), first)
        self._weights = sum(layer.weights for layer in inputs.plan.layers)
        self._fixed = sum(
            stored_bytes(layer.rows, layer.features, layer.scheme)
            for layer in inputs.plan.layers
            if layer.name not in self._layers
        )
        self._options = {
            group: self._options_of(members) for group, members in self._groups().items()
        }

    def next_after(self, attempt: Attempt) -> Assignment:
        """The assignment to try after `attempt`."""
        now = total(self._options, self._choices_of(attempt.recipe))
        perplexity = attempt.look.metrics.get(PERPLEXITY)
        gain = _gain(perplexity, now.loss)
        most = self._loss_to_aim_at(attempt, now.loss, gain)
        budget = int(self._recipe.repair.max_bits_per_weight * self._weights / 8) - self._fixed
        try:
            wanted = fewest_bytes(self._options, most)
        except AllocationError:  # not even the best choices: as near as they come
            wanted = least_loss(self._options, 16 * self._weights)
        chosen = wanted if wanted.bytes <= budget else least_loss(self._options, budget)
        return Assignment(
            layers={**self._recipe.layers, **self._layers_of(chosen)},
            predicted=None
            if perplexity is None or perplexity.baseline is None
            else predicted_increase(perplexity.baseline, chosen.loss, gain),
            needed=8 * (wanted.bytes + self._fixed) / self._weights,
        )

    def rows(self) -> Iterator[dict[str, str | float]]:
        """A row for each choice of each layer: what it costs."""
        for name, choices in self._costs.items():
            layer = self._layers[name]
            for choice, cost in choices.items():
                taken = self._taken(layer, choice)
                yield {
                    "layer": name,
                    "choice": choice,
                    "bits per weight": 8 * taken / layer.weights,
                    "loss": cost.loss,
                    "error": cost.error,
                }

    def _loss_to_aim_at(self, attempt: Attempt, loss: float, gain: float) -> float:
        most = _PROGRESS * loss
        perplexity = attempt.look.metrics.get(PERPLEXITY)
        if perplexity is not None and not perplexity.passed:
            limit = _limit_left(perplexity, attempt.recipe)
            assert perplexity.baseline is not None
            most = min(most, loss_allowed(perplexity.baseline, _AIM * limit, gain))
        divergence = attempt.look.metrics.get(DIVERGENCE)
        if divergence is not None and not divergence.passed:  # the layers' losses are of its kind
            most = min(most, _AIM * loss * _share_left(divergence, attempt.recipe))
        return most

    def _groups(self) -> dict[str, list[PlannedLayer]]:
        groups: dict[str, list[PlannedLayer]] = {}
        for layer in self._layers.values():
            together = self._recipe.repair.together
            groups.setdefault(layer.statistics if together else layer.name, []).append(layer)
        return groups

    def _options_of(self, members: list[PlannedLayer]) -> list[Option]:
        shared = set.intersection(*({*self._costs[layer.name]} for layer in members))
        return [
            Option(
                choice,
                sum(self._taken(layer, choice) for layer in members),
                sum(self._costs[layer.name][choice].loss for layer in members),
            )
            for choice in self._costs[members[0].name]
            if choice in shared
        ]

    def _taken(self, layer: PlannedLayer, choice: str) -> int:
        """Bytes."""
        scheme = layer.under(self._recipe.scheme, choice).scheme
        return stored_bytes(layer.rows, layer.features, scheme)

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


def _measure(recipe: Recipe, inputs: Inputs, layers: list[PlannedLayer], first: Candidate) -> Costs:
    """Every choice that goes with a layer, quantized and measured, block by block: each alone in
    the 16-bit model, where a correction for what comes before it would be an error of its own."""
    corrected = recipe.calibration.correction > 0
    alone = recipe.model_copy(
        update={"calibration": recipe.calibration.model_copy(update={"correction": 0.0})}
    )
    blocks = sorted({layer.block for layer in layers})
    made = {
        (block, choice): [
            quantize_readers.submit(alone, inputs.model, readers, readers.given(first.statistics))
            for readers in readers_of(alternatives, corrected)
        ]
        for block in blocks
        for choice, alternatives in _alternatives(recipe, layers, block).items()
    }
    measured = []
    for block in blocks:
        trials = {
            layer.name: {OWN: first.layers[layer.name]} for layer in layers if layer.block == block
        }
        for (of_block, choice), futures in made.items():
            for future in futures if of_block == block else ():
                for name, artifact in future.result().made.items():
                    trials[name][choice] = artifact
        measured.append(sensitivity.submit(recipe, inputs.model, inputs.calibration, block, trials))
    step = stepper("sensitivity", len(measured))
    costs: Costs = {}
    for each in measured:
        costs |= each.result()
        step()
    if "bf16" in recipe.repair.candidates:  # nothing is rounded: nothing is lost
        costs = {name: found | {"bf16": Cost(0.0, 0.0)} for name, found in costs.items()}
    return costs


def _alternatives(
    recipe: Recipe, layers: list[PlannedLayer], block: int
) -> dict[str, list[PlannedLayer]]:
    """A block's layers under each candidate that goes with their width and differs from their own
    scheme; and as they are, where the candidate's own are corrected."""
    found: dict[str, list[PlannedLayer]] = {}
    if recipe.calibration.correction:
        found[OWN] = [each for each in layers if each.block == block]
    for choice in recipe.repair.candidates:
        for layer in (each for each in layers if each.block == block):
            other = layer.under(recipe.scheme, choice)
            fits = other.scheme.bits == 8 or layer.features >= other.scheme.group_size
            if choice != "bf16" and fits and other != layer:
                found.setdefault(choice, []).append(other)
    return found


def _gain(perplexity: Metric | None, loss: float) -> float:
    """What the measured increase makes of the losses' sum; 1 where nothing rose."""
    if perplexity is None or not perplexity.baseline or not perplexity.candidate or not loss:
        return 1.0
    rise = math.log(perplexity.candidate / perplexity.baseline)
    return rise / loss if rise > 0 else 1.0


def _share_left(divergence: Metric, recipe: Recipe) -> float:
    """Of a divergence the share that passes, less what the interval adds where that is judged."""
    assert divergence.limit is not None
    assert divergence.candidate is not None
    limit = divergence.limit
    if recipe.gates.confidence is not None and divergence.interval:
        limit -= divergence.interval[1] - divergence.candidate
    return max(limit, 0.1 * divergence.limit) / divergence.candidate


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
