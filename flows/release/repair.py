"""A rejected candidate gets more bits where they pay, until the gates pass or the budget is spent.

Every choice for every layer is quantized and its loss measured, once
(`flows.release.repair_options`); the knapsack picks the fewest bits whose predicted increase is
below the limit (`dpq_core.repair.allocation`); the next candidate is made, and what it cost
corrects the prediction. Nothing is computed twice: layers come from the store.

All this looks at the half of the documents that chooses (`dpq_core.verdict.halves`). The last
candidate is then judged on the other half, once; a rejection there is the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dpq_core.evaluation.scores import PERPLEXITY
from dpq_core.recipe import Recipe
from flows.release.candidate import Attempt, attempt, judged
from flows.release.repair_options import Options
from tasks.evaluate import Measured
from tasks.preflight import Inputs, replanned
from tasks.support.progress import stepper


@dataclass
class Repair:
    """The first attempt and those after it; options: None where nothing was to be repaired."""

    attempts: list[Attempt]
    options: Options | None = None

    @property
    def last(self) -> Attempt:
        return self.attempts[-1]


def can_be_repaired(attempt: Attempt) -> bool:
    """Whether it missed a gate, and more bits can help: nothing is broken but numbers."""
    sound = not any(attempt.candidate.integrity.values())
    metrics = attempt.look.metrics.values()
    missed = any(not metric.passed for metric in metrics)
    return sound and missed and not any(metric.wrong for metric in metrics)


def repair(recipe: Recipe, inputs: Inputs, baseline: Measured, first: Attempt) -> Repair:
    """Attempts until one passes where it is looked at, the rounds are spent, or a plan changes
    nothing any more; the last one is judged. A rejection's reasons say what would have been needed,
    or that the documents that choose saw no need."""
    if not recipe.repair.enabled:
        return Repair([first])
    made = _rounds(recipe, inputs, baseline, first) if can_be_repaired(first) else Repair([first])
    last = judged(made.last, baseline)
    made.attempts[-1] = last
    if last.verdict.verdict != "rejected":
        return made
    if not can_be_repaired(last) or made.options is None:
        if last.look.verdict == "promoted":
            made.attempts[-1] = last.because(
                "repair: the half of the documents that chooses lets it pass, so no more bits were"
                " given: more documents bring the halves together"
            )
        return made
    made.attempts[-1] = last.because(
        f"repair: {len(made.attempts) - 1} rounds, up to {last.bits_per_weight:.2f} bits a weight;"
        f" {made.options.next_after(last).needed:.2f} are predicted to be needed, and"
        f" repair.max_bits_per_weight is {recipe.repair.max_bits_per_weight:g}"
    )
    return made


def _rounds(recipe: Recipe, inputs: Inputs, baseline: Measured, first: Attempt) -> Repair:
    options = Options(recipe, inputs, first.candidate)
    attempts = [first]
    step = stepper("repair", recipe.repair.max_rounds)
    for _ in range(recipe.repair.max_rounds):
        assignment = options.next_after(attempts[-1])
        if assignment.layers == attempts[-1].recipe.layers:
            break
        changed = recipe.model_copy(update={"layers": assignment.layers})
        inputs = replanned(inputs, changed)
        attempts.append(attempt(changed, inputs, baseline, assignment.predicted))
        step()
        if not can_be_repaired(attempts[-1]):
            break
    return Repair(attempts, options)


def round_rows(attempts: list[Attempt]) -> Iterator[dict[str, str | int | float | None]]:
    """The table of rounds: what each bit bought, and the prediction beside what was measured on the
    documents that choose."""
    for number, each in enumerate(attempts):
        perplexity = each.look.metrics.get(PERPLEXITY)
        missed = [name for name, metric in each.look.metrics.items() if not metric.passed]
        yield {
            "round": number,
            "bits per weight": each.bits_per_weight,
            "layers raised": len(each.recipe.layers),
            "predicted increase": each.predicted,
            "measured increase": perplexity.delta if perplexity else None,
            "gates missed": ", ".join(missed) or "none",
        }
