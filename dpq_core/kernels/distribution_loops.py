"""Compiled loops over two distributions for CPUs: NumPy in, NumPy out. `dpq_core.kernels.cpu` calls
them; the definition is `definitions.compare`.

A number of a row belongs to the lane of its place modulo `LANES`, whatever the processor's vectors
hold, and lanes are added in order: so sums have the same bits on every processor that has fused
multiply-add. Like `numba_loops`, whatever these loops inline stands in this file.
"""

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from dpq_core.kernels.numba_loops import compiled

LANES = 32
_ANY = {"inline": "always", "error_model": "numpy"}

_LEAST = -700.0  # e to the power of less is no normal float64; counted as nothing
_UNITS = 1.5 * 2.0**52  # adding it leaves no bits below 1
_TO_BINARY = 1 / math.log(2)
# ln 2 in two parts, of which n · the first is exact (fdlibm, e_exp.c)
_LN2_HIGH = 6.93147180369123816490e-01
_LN2_LOW = 1.90821492927058770002e-10
_BIAS, _MANTISSA = np.int64(1023), np.int64(52)
_2, _3, _4, _5, _6, _7, _8, _9, _10, _11, _12 = (1 / math.factorial(k) for k in range(2, 13))

_Floats = NDArray[np.float32]


@numba.njit(**_ANY)
def _exp(x: Any) -> Any:
    """e**x of a float64 up to 0: 2**n · e**r with |r| ≤ ln 2 / 2, and Taylor's series, whose next
    term is below half a unit of the last place."""
    power = _LEAST if x < _LEAST else x
    shifted = power * _TO_BINARY + _UNITS
    n = shifted - _UNITS
    r = (power - n * _LN2_HIGH) - n * _LN2_LOW
    high = _8 + r * (_9 + r * (_10 + r * (_11 + r * _12)))
    series = 1 + r * (
        1 + r * (_2 + r * (_3 + r * (_4 + r * (_5 + r * (_6 + r * (_7 + r * high))))))
    )
    scale = np.int64((np.float64(shifted).view(np.int64) + _BIAS) << _MANTISSA).view(np.float64)
    return 0.0 if x < _LEAST else series * scale


@compiled()
def _largest(x: _Floats) -> Any:
    """The largest number of a row and the first place that has it. NaN is passed over."""
    top, place = np.full(LANES, -np.inf, np.float32), np.zeros(LANES, np.int32)
    whole = len(x) // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            value = x[start + lane]
            higher = value > top[lane]
            top[lane] = value if higher else top[lane]
            place[lane] = start + lane if higher else place[lane]
    for at in range(whole, len(x)):
        if x[at] > top[at - whole]:
            top[at - whole], place[at - whole] = x[at], at
    best = 0
    for lane in range(1, LANES):
        if top[lane] > top[best] or (top[lane] == top[best] and place[lane] < place[best]):
            best = lane
    return np.float64(top[best]), place[best]


@compiled(fastmath={"contract"})
def _sums(a: _Floats, b: _Floats, most_a: float, most_b: float) -> Any:
    """Σ exp(a − most_a), Σ exp(a − most_a) (a − b), Σ exp(b − most_b)."""
    total, apart, other = np.zeros(LANES), np.zeros(LANES), np.zeros(LANES)
    whole = len(a) // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            _add(total, apart, other, lane, a[start + lane], b[start + lane], most_a, most_b)
    for at in range(whole, len(a)):
        _add(total, apart, other, at - whole, a[at], b[at], most_a, most_b)
    return _added(total), _added(apart), _added(other)


@numba.njit(**_ANY)
def _add(
    total: Any, apart: Any, other: Any, lane: int, a: Any, b: Any, most_a: float, most_b: float
) -> None:
    """One piece's part of each sum."""
    p, q = np.float64(a), np.float64(b)
    share = _exp(p - most_a)
    total[lane] += share
    apart[lane] += share * (p - q) if share > 0 else 0.0
    other[lane] += _exp(q - most_b)


@numba.njit(**_ANY)
def _added(lanes: Any) -> Any:
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    return total


@compiled()
def compare(
    first: int,
    last: int,
    sums: NDArray[np.float64],  # [5, tokens], changed
    best: NDArray[np.int64],  # [2, tokens], changed
    offset: int,
    a: _Floats,  # [tokens, pieces]
    b: _Floats,  # [tokens, pieces]
) -> None:
    """`definitions.compare` of some tokens."""
    for row in range(first, last):
        (top_a, place_a), (top_b, place_b) = _largest(a[row]), _largest(b[row])
        old_a, old_b = sums[0, row], sums[3, row]
        if top_a > old_a:
            sums[0, row], best[0, row] = top_a, place_a + offset
        if top_b > old_b:
            sums[3, row], best[1, row] = top_b, place_b + offset
        most_a, most_b = sums[0, row], sums[3, row]
        total, apart, other = _sums(a[row], b[row], most_a, most_b)
        shrunk = math.exp(old_a - most_a)
        sums[1, row] = sums[1, row] * shrunk + total
        sums[2, row] = sums[2, row] * shrunk + apart
        sums[4, row] = sums[4, row] * math.exp(old_b - most_b) + other
