"""Codes in bytes.

Weights: eight codes of four bits (or four of eight) an int32 along the input, lowest first; a row
whose length is no multiple of that is filled with zeros. Zero points: two a byte along the groups,
low nibble first. Wide integers are made of a few million codes at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int64)
_PIECE = 1 << 22  # codes: an output head has many


def pack_codes(codes: Tensor, bits: int = 4) -> Tensor:
    """[out, in] uint8 codes of 4 or 8 bits → [out, ceil(in · bits / 32)] int32."""
    a_word = 32 // bits

    def packed(codes: Tensor) -> Tensor:
        parts: Tensor = pad(codes, (0, -codes.shape[1] % a_word)).unflatten(1, (-1, a_word)).long()
        words = (parts << torch.arange(0, 32, bits, device=codes.device)).sum(2)
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)

    return _by_rows(packed, codes, codes.shape[1])


def unpack_codes(packed: Tensor, features: int) -> Tensor:
    """[out, ceil(features / 8)] int32 → [out, features] uint8.

    Raises:
        ValueError: the packed width does not hold `features` codes.
    """
    if packed.shape[1] != -(-features // 8):
        raise ValueError(
            f"{packed.shape[1]} packed words a row do not hold {features} codes: "
            f"expected {-(-features // 8)}"
        )

    def unpacked(packed: Tensor) -> Tensor:
        nibbles: Tensor = (packed.long().unsqueeze(2) >> _SHIFTS.to(packed.device)) & 15
        return nibbles.flatten(1)[:, :features].to(torch.uint8)

    return _by_rows(unpacked, packed, features)


def _by_rows(made: Callable[[Tensor], Tensor], rows: Tensor, codes: int) -> Tensor:
    """What `made` gives of rows of so many codes, which do not know of one another."""
    every = max(1, _PIECE // max(1, codes))
    if len(rows) <= every:
        return made(rows)
    return torch.cat([made(part) for part in rows.split(every)])


def pack_zero_points(zero_points: Tensor) -> Tensor:
    """[out, G] uint8 0…15 → [out, ceil(G / 2)] uint8."""
    pairs: Tensor = pad(zero_points, (0, zero_points.shape[1] % 2)).unflatten(1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_zero_points(packed: Tensor, groups: int) -> Tensor:
    """[out, ceil(groups / 2)] uint8 → [out, groups] uint8. ValueError: another width."""
    if packed.shape[1] != -(-groups // 2):
        raise ValueError(f"{packed.shape[1]} bytes a row do not hold {groups} zero points")
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :groups]
