"""All differences between two evaluations, by the metric's name."""

from collections.abc import Sequence

from dpq_core.evaluation.scores import PERPLEXITY, PERPLEXITY_WORD, Scores
from dpq_core.evaluation.text_divergence import TextDivergence
from dpq_core.verdict.closeness import closeness
from dpq_core.verdict.flips import FLIPS, OF_ANSWERS, flips, with_choices
from dpq_core.verdict.pairing import CONFIDENCE, Difference, Evaluation, Failure, difference

MMLU = "mmlu"
COMMONSENSE = (
    "hellaswag",
    "lambada_openai",
    "boolq",
    "arc_easy",
    "piqa",
    "winogrande",
    "arc_challenge",
    "openbookqa",
)


def compare(
    baseline: Evaluation,
    candidate: Evaluation,
    confidence: float = CONFIDENCE,
    divergence: TextDivergence | Failure | None = None,
) -> dict[str, Difference]:
    """All differences by the metric's name: perplexities, divergence where it was measured, the
    suites' plain mean, each suite, and how many answers changed (of the mean, and of MMLU).

    The mean is over the suites of accuracy but MMLU. It is called `commonsense_accuracy` where
    these are the eight of the literature, else `accuracy_average`.
    """
    names = list(dict.fromkeys([*baseline, *candidate]))
    rolling = [
        name
        for name in names
        for scores in (baseline.get(name), candidate.get(name))
        if isinstance(scores, Scores) and scores.metric == PERPLEXITY_WORD
    ]
    averaged = [name for name in names if name not in (PERPLEXITY, MMLU, *rolling)]
    found: dict[str, Difference] = {}
    if PERPLEXITY in names:
        found[PERPLEXITY] = difference(baseline, candidate, [PERPLEXITY], confidence)
    if divergence is not None:
        found |= closeness(divergence, confidence)
    if averaged:
        mean = _answers(baseline, candidate, averaged, confidence)
        found |= dict(zip((average_name(averaged), FLIPS), mean, strict=True))
    for name in names:
        if name in rolling:
            metric = PERPLEXITY_WORD if name == "wikitext" else f"{PERPLEXITY_WORD}.{name}"
            found[metric] = difference(baseline, candidate, [name], confidence)
        elif name != PERPLEXITY:
            accuracy, changed = _answers(baseline, candidate, [name], confidence)
            found[f"accuracy.{name}"] = accuracy
            if name == MMLU:
                found[f"{FLIPS}.{MMLU}"] = changed
    return found


def _answers(
    baseline: Evaluation, candidate: Evaluation, suites: Sequence[str], confidence: float
) -> tuple[Difference, Difference]:
    """The difference in the mean accuracy over suites, and how many answers changed."""
    found = difference(baseline, candidate, suites, confidence)
    if found.wrong:
        wrong = Difference(OF_ANSWERS, wrong=found.wrong, unmeasured=found.unmeasured)
        return found, wrong
    pairs = [
        (before, after)
        for before, after in ((baseline[suite], candidate[suite]) for suite in suites)
        if isinstance(before, Scores) and isinstance(after, Scores)
    ]
    return with_choices(found, pairs), flips(pairs, confidence)


def average_name(suites: list[str]) -> str:
    """What the plain mean over these suites is called."""
    return "commonsense_accuracy" if set(suites) == set(COMMONSENSE) else "accuracy_average"
