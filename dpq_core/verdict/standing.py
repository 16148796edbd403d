"""A difference and its limit, in three words.

    shown       the worse end of the difference's interval is within the limit
    not shown   the difference is, the worse end is not, or there are too few windows for one
    failed      the difference is not within the limit, is not a number, or is missing

*Within* is strict: a loss that equals its limit fails. Two limits are floors and may be reached:
agreement's, and those of ratios, which have no interval: what reaches the limit is shown.

How many documents would show it: the error of a mean of n paired differences is their deviation
over √n, so the interval reaches from the measured loss to its worse end by r ∝ 1/√n, and

    n' = n · (r / (limit − loss))²

documents bring the worse end to the limit, were the loss to stay (the sample size of a comparison
of matched pairs: Agresti, Categorical Data Analysis, 2013, 11.1; for evaluations of language models
Miller, Adding Error Bars to Evals, 2024, section 5). The next documents have a loss of their own:
half of all tries with n' would show it. The more answers turn, both ways, the larger r.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from dpq_core.evaluation.scores import AFTER_BOS, PERPLEXITIES, PERPLEXITY
from dpq_core.evaluation.text_divergence import DIVERGENCE
from dpq_core.recipe import GatesSection
from dpq_core.verdict.closeness import NATS, SHARE, TOP1
from dpq_core.verdict.comparison import MMLU
from dpq_core.verdict.flips import FLIPS, OF_ANSWERS
from dpq_core.verdict.pairing import Difference
from dpq_core.verdict.resampling import FEWEST

Standing = Literal["shown", "not shown", "failed"]

ACCURACY = "accuracy"  # of a model that has one test set
AVERAGES = ("commonsense_accuracy", "accuracy_average", ACCURACY)

_DIGITS = 9  # of a loss that count: 64.1 - 63.6 is half a point, not a hair less
_SETTINGS = {
    PERPLEXITY: "perplexity_increase",
    **dict.fromkeys((*AVERAGES, f"accuracy.{MMLU}"), "accuracy_drop"),
    DIVERGENCE: "divergence",
    TOP1: "top1_agreement",
    **dict.fromkeys((FLIPS, f"{FLIPS}.{MMLU}"), "flips"),
}
_OF_THE_BASELINE = ("perplexity_increase", "accuracy_drop")  # in percent, where mode is relative
_LESS_IS_WORSE = ("accuracy_drop", "top1_agreement")
_BY_WINDOW = (PERPLEXITY, AFTER_BOS, NATS, SHARE)


@dataclass(frozen=True)
class Metric(Difference):
    """A difference that was judged. `limit` bounds the loss, in the unit of the gates' mode; of a
    ratio or a share it is what must be reached (None: no gate looks, and there is no standing).
    needed: about how many documents (or windows) would show what is not shown."""

    limit: float | None = None
    passed: bool = False
    standing: Standing | None = None
    needed: int | None = None

    @property
    def counted(self) -> str:
        """What `documents` and `needed` count."""
        return "windows" if self.metric in _BY_WINDOW else "documents"

    @property
    def way_out(self) -> str:
        """What would show it; empty where that is no question."""
        if self.standing != "not shown":
            return ""
        if self.interval is None:
            return f"fewer than {FEWEST} {self.counted} have no interval"
        if self.needed is None:
            return ""
        return f"about {_rounded(self.needed):,} {self.counted} would show it"


def limit_of(name: str, gates: GatesSection) -> float | None:
    """The limit of a metric; None where no gate looks."""
    return getattr(gates, _SETTINGS[name]) if name in _SETTINGS else None


def judged_metric(name: str, found: Difference, gates: GatesSection) -> Metric:
    """A difference against its limit. It passes where it is shown, and without `gates.confidence`
    where it is not shown too; without an interval `gates.confidence` has nothing to judge."""
    base: dict[str, Any] = {f.name: getattr(found, f.name) for f in fields(Difference)}
    limit = limit_of(name, gates)
    if found.wrong or found.delta is None or found.baseline is None:
        return Metric(**base, limit=limit, standing=None if limit is None else "failed")
    if limit is None:
        return Metric(**base, passed=True)
    loss, worst, bound = _loss(name, found, gates, limit)
    standing = _standing(loss, worst, bound, floor=name == TOP1)
    certain = gates.confidence is not None
    base["unmeasured"] = certain and worst is None and standing != "failed"
    needed = None
    if standing == "not shown" and worst is not None:
        needed = _needed(found.documents, loss, worst, bound)
    passed = standing == "shown" or (standing == "not shown" and not certain)
    return Metric(**base, limit=limit, passed=passed, standing=standing, needed=needed)


def reason(name: str, metric: Metric, gates: GatesSection) -> str:
    """Why a metric does not pass, with its numbers."""
    if metric.wrong:
        return f"{name}: {metric.wrong}"
    if metric.metric == SHARE:
        said = f"{name}: {metric.candidate:.4f} of the most likely tokens are the same"
        fails = f"which does not reach the limit of {metric.limit:g}"
    elif metric.metric == NATS:
        said, limit = f"{name}: {metric.candidate:.4g} nats a token", f"{metric.limit:g}"
        fails = f"which is not below the limit of {limit}"
    elif metric.metric == OF_ANSWERS:
        said = f"{name}: {metric.candidate:.4g} % of the answers changed"
        fails = f"which is not below the limit of {metric.limit:g} %"
    else:
        return _reason_of_change(name, metric, gates)
    return f"{said}, {fails}" if metric.standing == "failed" else f"{said}{_unshown(metric, gates)}"


def _reason_of_change(name: str, metric: Metric, gates: GatesSection) -> str:
    perplexity = metric.metric in PERPLEXITIES
    unit = "%" if gates.mode == "relative" else "" if perplexity else " points"
    change = (
        f"{name}: {'increase' if perplexity else 'drop'} from {metric.baseline:.4f} to "
        f"{metric.candidate:.4f} ({metric.delta:+.4f})"
    )
    if metric.standing == "failed":
        return f"{change} is not below the limit of {metric.limit:g}{unit}"
    return f"{change}{_unshown(metric, gates, unit)}"


def _unshown(metric: Metric, gates: GatesSection, unit: str = "") -> str:
    if metric.interval is None:
        return f": too few {metric.counted} for the interval that gates.confidence asks for"
    low, high = metric.interval
    out = f"; {metric.way_out}" if metric.way_out else ""
    return (
        f", {gates.confidence:.0%} interval of the difference {low:+.4f} to {high:+.4f}: not shown"
        f" to be within the limit of {metric.limit:g}{unit}{out}"
    )


def _loss(
    name: str, found: Difference, gates: GatesSection, limit: float
) -> tuple[float, float | None, float]:
    """The loss, the worst that the interval holds, and what the loss must stay below: positive is
    worse; in the limit's unit."""
    assert found.delta is not None
    assert found.baseline is not None
    setting = _SETTINGS[name]
    scale = -1.0 if setting in _LESS_IS_WORSE else 1.0
    if gates.mode == "relative" and setting in _OF_THE_BASELINE:
        scale *= 100 / found.baseline if found.baseline else math.inf
    bound = 1 - limit if setting == "top1_agreement" else limit
    reached = None if found.interval is None else max(scale * end for end in found.interval)
    return scale * found.delta, reached, bound


def _standing(loss: float, worst: float | None, bound: float, floor: bool) -> Standing:
    if not _within(loss, bound, floor):
        return "failed"
    return "shown" if worst is not None and _within(worst, bound, floor) else "not shown"


def _within(loss: float, bound: float, floor: bool) -> bool:
    """Whether a loss is; NaN is not."""
    loss, bound = round(loss, _DIGITS), round(bound, _DIGITS)
    return loss <= bound if floor else loss < bound


def _needed(documents: int, loss: float, worst: float, bound: float) -> int | None:
    """As the head of this file says; more than there are. None where the loss is the bound, which
    no number of documents would show, or the interval has no end."""
    if not documents or bound - loss <= 0 or not math.isfinite(worst):
        return None
    return max(documents + 1, math.ceil(documents * ((worst - loss) / (bound - loss)) ** 2))


def _rounded(number: int) -> int:
    """To two digits."""
    return round(number, 2 - len(str(number)))
