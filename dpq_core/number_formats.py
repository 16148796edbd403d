"""Number formats, one row each. Without torch: recipes name them, and are read by commands that
compute nothing. Rounding to them is in `dpq_core.arithmetic.formats`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NumberFormat:
    """A grid of numbers: the integers, or the E4M3 values, of [minimum, maximum]."""

    name: str
    bits: int
    minimum: float
    maximum: float
    is_float: bool

    @property
    def steps(self) -> int:
        """Distance from the lowest to the highest integer code."""
        return int(self.maximum - self.minimum)


FORMATS = {
    f.name: f
    for f in (
        NumberFormat("uint4", 4, 0, 15, is_float=False),
        NumberFormat("int8", 8, -127, 127, is_float=False),  # symmetric: -128 is not used
        NumberFormat("e4m3", 8, -448, 448, is_float=True),
        NumberFormat("e4m3_240", 8, -240, 240, is_float=True),
    )
}
