"""How far results are from what they should be."""

from torch import Tensor


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`; 0 where they are the same, zeros too."""
    off = (found - expected).norm()
    return float(off / expected.norm()) if off != 0 else 0.0
