"""Numbers of few bits: rounding to a format, four-bit codes and what they stand for, codes in
bytes."""

from dpq_core.arithmetic.affine import CODES, Affine, ColumnGrid
from dpq_core.arithmetic.formats import FORMATS, NumberFormat, round_to
from dpq_core.arithmetic.packing import (
    pack_codes,
    pack_zero_points,
    unpack_codes,
    unpack_zero_points,
)

__all__ = [
    "CODES",
    "FORMATS",
    "Affine",
    "ColumnGrid",
    "NumberFormat",
    "pack_codes",
    "pack_zero_points",
    "round_to",
    "unpack_codes",
    "unpack_zero_points",
]
