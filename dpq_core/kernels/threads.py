"""A kernel's work, shared among as many threads as torch has here."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")


def in_ranges(kernel: Callable[[int, int], T], count: int, unit: int = 1) -> list[T]:
    """What `kernel(first, last)` returns for ranges of 0 … count − 1, whole units each but for the
    last one. The kernel holds no lock of Python's."""
    units = -(-count // unit)
    threads = min(torch.get_num_threads(), units)
    if threads <= 1:
        return [kernel(0, count)]
    cuts = [min(units * n // threads * unit, count) for n in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        made = [pool.submit(kernel, *cut) for cut in pairwise(cuts)]
    return [each.result() for each in made]
