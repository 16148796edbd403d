"""The knapsack against every assignment there is."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_core.repair.allocation import (
    AllocationError,
    Option,
    fewest_bytes,
    least_loss,
    loss_allowed,
    predicted_increase,
    total,
)

OPTIONS = {
    "a": [Option("four", 4, 3.0), Option("eight", 8, 1.0), Option("sixteen", 16, 0.0)],
    "b": [Option("four", 40, 0.2), Option("eight", 80, 0.1), Option("sixteen", 160, 0.0)],
}


def assignments(options):
    for chosen in itertools.product(*options.values()):
        yield {group: option.choice for group, option in zip(options, chosen, strict=True)}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(44, ("four", "four")), (48, ("eight", "four")), (56, ("sixteen", "four"))],
)
def test_bits_go_where_they_pay(budget, expected):
    found = least_loss(OPTIONS, budget)
    assert tuple(found.choices.values()) == expected
    assert found == total(OPTIONS, found.choices)
    assert found.bytes <= budget


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(4, ("four", "four")), (1.2, ("eight", "four")), (0.15, ("sixteen", "eight"))],
)
def test_no_more_bits_than_needed(limit, expected):
    found = fewest_bytes(OPTIONS, limit)
    assert tuple(found.choices.values()) == expected
    assert found.loss <= limit


def test_among_equals_the_first_of_the_table():
    same = {"a": [Option("first", 4, 1.0), Option("second", 4, 1.0)]}
    assert least_loss(same, 4).choices == fewest_bytes(same, 1).choices == {"a": "first"}


def test_what_cannot_be_met_is_told_with_what_would_be_needed():
    with pytest.raises(AllocationError, match="take 44 bytes, and the budget is 43"):
        least_loss(OPTIONS, 43)
    only = {"a": [Option("four", 4, 3.0)]}
    with pytest.raises(AllocationError, match=r"lose 3 nats a token, and the limit is 2\.5"):
        fewest_bytes(only, 2.5)


option = st.tuples(st.integers(1, 40), st.integers(0, 40))
tables = st.lists(st.lists(option, min_size=1, max_size=3), min_size=1, max_size=4).map(
    lambda rows: {
        str(group): [Option(str(i), size, loss / 8) for i, (size, loss) in enumerate(row)]
        for group, row in enumerate(rows)
    }
)


@given(options=tables, share=st.floats(0, 1))
@settings(deadline=None, max_examples=150)
def test_no_assignment_is_better(options, share):
    totals = [total(options, choices) for choices in assignments(options)]
    sizes, losses = [t.bytes for t in totals], [t.loss for t in totals]
    budget = min(sizes) + int(share * (max(sizes) - min(sizes)))
    within = [t.loss for t in totals if t.bytes <= budget]
    assert least_loss(options, budget).loss == pytest.approx(min(within), abs=1e-6)
    limit = min(losses) + share * (max(losses) - min(losses)) + 1e-6
    within = [t.bytes for t in totals if t.loss <= limit]
    assert fewest_bytes(options, limit).bytes == min(within)


@given(st.floats(1.1, 500), st.floats(1e-4, 5), st.floats(0.1, 10))
def test_prediction_and_its_inverse(perplexity, increase, gain):
    loss = loss_allowed(perplexity, increase, gain)
    assert predicted_increase(perplexity, loss, gain) == pytest.approx(increase)
    assert math.isclose(perplexity * math.exp(gain * loss), perplexity + increase)
