"""The verdict on a quantized classifier: accuracy on the held-out images, and the weights' size.

Accuracy is judged as everywhere (`dpq_core.gates`): strictly below the limit, paired image by
image. The size is that of the weights' codes; scales are shown beside it, since a depthwise
convolution has nine weights for each of its scales, and no small network would reach four times
with them.
"""

from collections.abc import Mapping
from dataclasses import replace

from dpq_core.convnet.artifact import WeightSizes
from dpq_core.convnet.recipe import ConvGates
from dpq_core.gates import Verdict, judge, ratio_metric
from dpq_core.pairing import CONFIDENCE, Difference, difference
from dpq_core.recipe import GatesSection
from dpq_core.scores import Scores

ACCURACY = "accuracy"
SIZE = "size_ratio"
_JUDGED_AS = "accuracy_average"  # its name among the language models' gates


def accuracy_change(
    baseline: Scores, candidate: Scores, confidence: float | None = None
) -> Difference:
    """Of two classifiers on the same images, in percent."""
    sides = ({ACCURACY: baseline}, {ACCURACY: candidate})
    return difference(*sides, [ACCURACY], confidence or CONFIDENCE)


def judge_classifier(
    change: Difference,
    sizes: WeightSizes,
    integrity: Mapping[str, str | None],
    gates: ConvGates,
) -> Verdict:
    """`promoted` or `rejected`, with every reason.

    Args:
        integrity: check name → None where it passed, else what is wrong.
    """
    limits = GatesSection(accuracy_drop=gates.accuracy_drop, confidence=gates.confidence)
    verdict = judge({_JUDGED_AS: change}, integrity, limits, limited=False)
    size = ratio_metric(SIZE, sizes.ratio, gates.size_ratio)
    reasons = [reason.replace(_JUDGED_AS, ACCURACY) for reason in verdict.reasons]
    if not size.passed:
        left = f"; in floating point: {', '.join(sizes.float_layers)}" if sizes.float_layers else ""
        reasons.append(
            f"{SIZE}: {sizes.ratio:.2f} is below the limit of {gates.size_ratio:g}{left}"
        )
    metrics = {ACCURACY: verdict.metrics[_JUDGED_AS], SIZE: size}
    return replace(
        verdict,
        verdict="rejected" if reasons else "promoted",
        reasons=tuple(reasons),
        metrics=metrics,
    )
