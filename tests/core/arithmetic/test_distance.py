"""Distances of results."""

import pytest
import torch

from dpq_core.arithmetic.distance import distance


def test_what_is_the_same_is_not_apart_zeros_too():
    zero, other = torch.zeros(2, 3), torch.tensor([[3.0, 0, 0], [0, 4, 0]])
    assert (distance(zero, zero), distance(other, other)) == (0, 0)
    assert distance(zero, other) == pytest.approx(1)
    assert distance(other, zero) == float("inf")
    assert torch.tensor(distance(other * torch.nan, other)).isnan()
