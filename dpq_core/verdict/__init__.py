"""Two models on the same documents: differences, how sure they are, gates."""

from dpq_core.verdict.gates import Metric, Verdict, compare, judge
from dpq_core.verdict.pairing import CONFIDENCE, Difference, Evaluation, Failure

__all__ = [
    "CONFIDENCE",
    "Difference",
    "Evaluation",
    "Failure",
    "Metric",
    "Verdict",
    "compare",
    "judge",
]
