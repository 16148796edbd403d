"""The divergence of perplexity's text: by window, its worst spots, on disk."""

import math

import numpy as np
import pytest
import torch
from pyarrow import parquet

from dpq_core.evaluation.divergence import Divergence
from dpq_core.evaluation.perplexity import window_scores
from dpq_core.evaluation.text_divergence import (
    TextDivergence,
    load_divergence,
    save_divergence,
    text_divergence,
)

LENGTH = 40
WINDOWS = torch.arange(3 * LENGTH).reshape(3, LENGTH)


class Letters:
    """As SentencePiece does it: a piece begins with its space, and a text loses the first."""

    def decode(self, tokens):
        return "".join(f" {token}" for token in tokens).removeprefix(" ")


class Halves:
    """Two tokens to a character, as bytes are."""

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def measured(far):
    """Nats by (window, place of the predicted token), else none."""
    nats = torch.zeros(3, LENGTH - 1, dtype=torch.float64)
    for (window, position), value in far.items():
        nats[window, position - 1] = value
    flat = nats.reshape(-1)
    return Divergence(flat, flat < 0.5)


FAR = {(2, 20): 3.0, (0, 5): 2.0, (2, 22): 1.0, (1, 39): 0.7}


def test_windows_have_the_names_that_perplexity_gives_them():
    found = text_divergence(measured(FAR), WINDOWS)
    assert found.windows == window_scores(WINDOWS, [0.0] * 3, "perplexity_token").documents
    assert found.nats.shape == found.agree.shape == (3, LENGTH - 1)
    assert found.nats[2, 19] == 3
    assert not found.agree[2, 19]
    assert found.nats.sum() == pytest.approx(sum(FAR.values()))


def test_spots_are_the_worst_first_and_not_one_twice():
    found = text_divergence(measured(FAR), WINDOWS, Letters())
    told = [(found.windows.index(s.window), s.position, s.nats) for s in found.spots]
    assert told[:3] == [(2, 20, 3.0), (0, 5, 2.0), (1, 39, pytest.approx(0.7))]  # 22 is near 20
    first, early, last = found.spots[:3]
    assert first.before.split() == [str(n) for n in range(80, 100)]
    assert (first.token, first.agree) == (" 100", False)
    assert first.after.split() == [str(n) for n in range(101, 113)]
    assert early.before.split() == [str(n) for n in range(5)]
    assert last.after == ""


def test_half_a_character_before_a_spot():
    text = "añb".encode()
    windows = torch.tensor([list(text)])
    found = text_divergence(
        Divergence(torch.tensor([0.0, 9.0, 0.0]), torch.tensor([True] * 3)), windows, Halves()
    )
    assert (found.spots[0].position, found.spots[0].token, found.spots[0].after) == (2, "ñ", "b")


def test_without_a_tokenizer_a_spot_is_a_number():
    spot = text_divergence(measured(FAR), WINDOWS).spots[0]
    assert (spot.before, spot.token, spot.after) == ("", "token 100", "")


def test_what_is_not_finite_is_the_worst():
    found = text_divergence(measured(FAR | {(1, 1): math.nan}), WINDOWS)
    assert (found.windows.index(found.spots[0].window), found.spots[0].position) == (1, 1)
    assert math.isnan(found.spots[0].nats)


def test_some_windows_bring_their_spots():
    found = text_divergence(measured(FAR), WINDOWS).some([2, 0])
    assert found.nats[0, 19] == 3
    assert {spot.window for spot in found.spots} == set(found.windows)
    assert len(found.windows) == 2


def test_it_survives_parquet(tmp_path):
    found = text_divergence(measured(FAR | {(1, 1): math.nan}), WINDOWS, Letters())
    save_divergence(found, tmp_path / "divergence.parquet")
    again = load_divergence(tmp_path / "divergence.parquet")
    assert again.windows == found.windows
    np.testing.assert_array_equal(again.nats, found.nats)
    np.testing.assert_array_equal(again.agree, found.agree)
    assert again.nats.dtype == np.float32
    assert again.spots[1:] == found.spots[1:]
    assert math.isnan(again.spots[0].nats)


def test_an_unknown_version_is_refused(tmp_path):
    path = tmp_path / "divergence.parquet"
    save_divergence(text_divergence(measured(FAR), WINDOWS), path)
    table = parquet.read_table(path)
    newer = {**table.schema.metadata, b"version": b"9"}
    parquet.write_table(table.replace_schema_metadata(newer), path)
    with pytest.raises(ValueError, match="version 9"):
        load_divergence(path)


def test_other_windows_are_refused():
    with pytest.raises(ValueError, match="117 tokens, and 2 windows of 40 have 78"):
        text_divergence(measured(FAR), WINDOWS[:2])
    with pytest.raises(ValueError, match="no divergence"):
        TextDivergence(["a"], np.zeros((2, 3), np.float32), np.zeros((2, 3), bool), ())
