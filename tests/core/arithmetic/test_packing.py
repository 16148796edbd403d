import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_core.arithmetic import packing
from dpq_core.arithmetic.packing import (
    pack_codes,
    pack_zero_points,
    unpack_codes,
    unpack_zero_points,
)


def random_codes(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(16, (rows, columns), generator=generator).to(torch.uint8)


shapes = given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 1 << 20))
modest = settings(deadline=None, max_examples=150)


@shapes
@modest
def test_codes_round_trip(rows, columns, seed):
    codes = random_codes(rows, columns, seed)
    packed = pack_codes(codes)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, (columns + 7) // 8)
    unpacked = unpack_codes(packed, columns)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@shapes
@modest
def test_zero_points_round_trip(rows, columns, seed):
    zero_points = random_codes(rows, columns, seed)
    packed = pack_zero_points(zero_points)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, (columns + 1) // 2)
    unpacked = unpack_zero_points(packed, columns)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, zero_points)


def test_codes_round_trip_from_a_transposed_view():
    codes = random_codes(19, 6, seed=0).T
    assert torch.equal(unpack_codes(pack_codes(codes), 19), codes)


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], [0x76543210]),
        ([0, 0, 0, 0, 0, 0, 0, 8], [0x80000000 - (1 << 32)]),  # the top bit is the sign
        ([8, 9, 10, 11, 12, 13, 14, 15], [0xFEDCBA98 - (1 << 32)]),
        ([15] * 8, [-1]),
        ([1, 2, 3], [0x321]),
        ([0] * 8 + [7], [0, 7]),
    ],
)
def test_golden_words(codes, words):
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8))
    assert packed.tolist() == [words]


def test_golden_bytes_are_little_endian_nibbles():
    packed = pack_codes(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8))
    assert packed.view(torch.uint8).tolist() == [[0x21, 0x43, 0x65, 0x87]]


def test_golden_zero_points():
    packed = pack_zero_points(torch.tensor([[1, 2, 15], [0, 8, 3]], dtype=torch.uint8))
    assert packed.tolist() == [[0x21, 0x0F], [0x80, 0x03]]


@pytest.mark.parametrize("features", [8, 17, 24])
def test_wrong_width_is_refused(features):
    packed = pack_codes(random_codes(2, 16, seed=0))
    assert unpack_codes(packed, 16).shape == (2, 16)
    with pytest.raises(ValueError, match=f"2 packed words a row do not hold {features} codes"):
        unpack_codes(packed, features)


@pytest.mark.parametrize("bits", [4, 8])
def test_pieces_are_the_whole(monkeypatch, bits):
    codes = torch.randint(1 << bits, (37, 50), dtype=torch.uint8)
    whole = pack_codes(codes, bits)
    monkeypatch.setattr(packing, "_PIECE", 300)
    assert torch.equal(pack_codes(codes, bits), whole)
    if bits == 4:
        assert torch.equal(unpack_codes(whole, 50), codes)
