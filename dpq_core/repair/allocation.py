"""Which layers get more bits: a multiple-choice knapsack, solved exactly.

Every layer takes one choice of a table. A choice costs bytes and a loss: the KL divergence (nats a
token) between the 16-bit model's next-token distributions and those of the model with this layer
alone quantized so. Losses add up to first order, and they are what perplexity rises by:

    ln(perplexity / perplexity16) ≈ gain · Σ loss        gain 1 for text that the model would write

`gain` is measured: a round of repair knows what its own assignment cost. Layers that one kernel
reads together take the same choice. Mixed-integer programming by HiGHS (`scipy.optimize.milp`);
among equals, the choice that comes first in the table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpq_core.errors import InputError

_TIE = 1e-9  # of the objective's scale, for each place further down the table


class AllocationError(InputError):
    """A budget that no assignment meets, with what would be needed."""


@dataclass(frozen=True)
class Option:
    """One choice for one group of layers. loss: nats a token; never below 0."""

    choice: str
    bytes: int
    loss: float


Options = Mapping[str, Sequence[Option]]  # by group of layers, in the table's order


@dataclass(frozen=True)
class Allocation:
    """A choice for every group, and what they add up to."""

    choices: dict[str, str]
    bytes: int
    loss: float


def least_loss(options: Options, max_bytes: int) -> Allocation:
    """The assignment of least loss that takes no more than `max_bytes`.

    Raises:
        AllocationError: even the smallest choices take more.
    """
    smallest = sum(min(option.bytes for option in row) for row in options.values())
    if smallest > max_bytes:
        raise AllocationError(
            f"the smallest choices take {smallest:,} bytes, and the budget is {max_bytes:,}:"
            " raise repair.max_bits_per_weight, or add a smaller choice"
        )
    return _solve(options, minimise="loss", bounded="bytes", most=max_bytes)


def fewest_bytes(options: Options, max_loss: float) -> Allocation:
    """The smallest assignment whose losses add up to no more than `max_loss` nats a token.

    Raises:
        AllocationError: even the best choices lose more.
    """
    best = sum(min(option.loss for option in row) for row in options.values())
    if best > max_loss:
        raise AllocationError(
            f"the best choices lose {best:.3g} nats a token, and the limit is {max_loss:.3g}: add a"
            " choice of more bits to repair.candidates"
        )
    return _solve(options, minimise="bytes", bounded="loss", most=max_loss)


def total(options: Options, choices: Mapping[str, str]) -> Allocation:
    """What given choices add up to."""
    chosen = [
        next(option for option in row if option.choice == choices[group])
        for group, row in options.items()
    ]
    return Allocation(
        dict(choices), sum(o.bytes for o in chosen), math.fsum(o.loss for o in chosen)
    )


def predicted_increase(perplexity: float, loss: float, gain: float = 1.0) -> float:
    """By how much perplexity rises for a total loss."""
    return perplexity * math.expm1(gain * loss)


def loss_allowed(perplexity: float, increase: float, gain: float = 1.0) -> float:
    """Inverse of `predicted_increase`."""
    return math.log1p(increase / perplexity) / gain


def _solve(options: Options, minimise: str, bounded: str, most: float) -> Allocation:
    from scipy.optimize import Bounds, LinearConstraint, milp  # a second

    if not options:
        return Allocation({}, 0, 0.0)
    places = [(group, place) for group, row in options.items() for place in range(len(row))]
    flat = [options[group][place] for group, place in places]
    objective = _scaled([getattr(option, minimise) for option in flat])
    objective += _TIE * np.array([place for _, place in places])
    costs = np.array([getattr(option, bounded) for option in flat], dtype=np.float64)
    scale = costs.max() or 1.0
    groups = list(options)
    one_each = np.zeros((len(groups), len(flat)))
    for column, (group, _) in enumerate(places):
        one_each[groups.index(group), column] = 1
    solution = milp(
        objective,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs[None] / scale, -np.inf, most / scale),
        ],
        options={"mip_rel_gap": 0},
    )
    if not solution.success:
        raise RuntimeError(f"no assignment was found: {solution.message}")
    taken = [place for place, used in zip(places, solution.x, strict=True) if used > 0.5]
    return total(options, {group: options[group][place].choice for group, place in taken})


def _scaled(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.array(values, dtype=np.float64)
    return array / (array.max() or 1.0)
