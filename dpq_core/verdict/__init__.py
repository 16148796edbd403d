"""Two models on the same documents: differences, how sure they are, gates."""

from dpq_core.verdict.comparison import compare
from dpq_core.verdict.gates import Verdict, judge
from dpq_core.verdict.pairing import CONFIDENCE, Difference, Evaluation, Failure
from dpq_core.verdict.standing import Metric

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
