"""The verdict on a quantized classifier: accuracy on the held-out images, and the file's size.

Accuracy is judged as everywhere (`dpq_core.verdict.gates`): strictly below the limit, paired image
by image. The size is that of what is deployed, scales, biases and graph with it, beside the float
network in the same kind of file.
"""

from collections.abc import Mapping
from dataclasses import replace

from dpq_core.convnet.artifact import WeightSizes
from dpq_core.convnet.recipe import ConvGates
from dpq_core.evaluation.scores import Scores
from dpq_core.recipe import GatesSection
from dpq_core.verdict.gates import Verdict, judge
from dpq_core.verdict.halves import ALL, those
from dpq_core.verdict.pairing import CONFIDENCE, Difference, difference
from dpq_core.verdict.ratios import ratio_metric
from dpq_core.verdict.standing import ACCURACY

SIZE = "size_ratio"


def accuracy_change(
    baseline: Scores,
    candidate: Scores,
    confidence: float | None = None,
    which: str = ALL,
) -> Difference:
    """The difference of two classifiers' accuracy on the same images, or those of them that `which`
    says, in percent."""
    before, after = (those({ACCURACY: scores}, which) for scores in (baseline, candidate))
    return difference(before, after, [ACCURACY], confidence or CONFIDENCE)


def judge_classifier(
    change: Difference,
    sizes: WeightSizes,
    float_file: int,
    integrity: Mapping[str, str | None],
    gates: ConvGates,
    limited: str | None = None,
    judged_on: str = ALL,
) -> Verdict:
    """The verdict, with every reason.

    Args:
        float_file: bytes of the float network's file.
        integrity: check name → None where it passed, else what is wrong.
        limited, judged_on: as of `dpq_core.verdict.gates.judge`.
    """
    limits = GatesSection(
        accuracy_drop=gates.accuracy_drop,
        confidence=gates.confidence,
        allow_limited=gates.allow_limited,
    )
    verdict = judge({ACCURACY: change}, integrity, limits, limited, judged_on=judged_on)
    ratio = sizes.ratio(float_file)
    size = ratio_metric(SIZE, ratio, gates.size_ratio)
    reasons = list(verdict.reasons)
    if not size.passed:
        left = f"; in floating point: {', '.join(sizes.float_layers)}" if sizes.float_layers else ""
        reasons.append(f"{SIZE}: {ratio:.2f} is below the limit of {gates.size_ratio:g}{left}")
    judged = replace(verdict, reasons=tuple(reasons), metrics={**verdict.metrics, SIZE: size})
    missed = verdict.verdict == "promoted" and not size.passed
    return replace(judged, verdict="rejected") if missed else judged


def float_checks(scores: Scores, gates: ConvGates) -> dict[str, str | None]:
    """Whether the float network knows these pictures: check name → None, or what is wrong."""
    limit = gates.float_accuracy_at_least
    if limit is None:
        return {}
    enough = scores.value >= limit
    reason = f"{scores.value:.2f} is below gates.float_accuracy_at_least {limit:g}: {_REMEDY}"
    return {"float accuracy": None if enough else reason}


def chance_warning(scores: Scores, classes: int) -> str | None:
    """What to say of a float network that guesses: at most twice what guessing gets, and what luck
    adds to it (three deviations)."""
    chance = 1 / classes
    luck = 3 * (chance * (1 - chance) / len(scores)) ** 0.5
    if scores.value / 100 > max(2 * chance, chance + luck):
        return None
    found = f"{scores.value:.2f} % of the pictures, as by chance"
    return f"the float network is right for {found}: {_REMEDY}"


_REMEDY = (
    "images.preset, mean and std as it was trained with, and folders in the order of its classes"
)
