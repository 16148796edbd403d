"""Trees of shared prefixes: every token once, and what each query sees through packs and spans."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_core.evaluation import forest
from dpq_core.evaluation.forest import Asked, chunks_of, sequences_of
from dpq_core.evaluation.packs import packs_of
from dpq_core.evaluation.spans import spans_of
from dpq_core.kernels.tree_attention import AT_ONCE, LANES

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def short_prefixes_are_shared(monkeypatch):
    monkeypatch.setattr(forest, "WORTH", 1)


def asked_of(sequences):
    return [Asked(tuple(ids), 1 + n % (len(ids) - 1), n) for n, ids in enumerate(sequences)]


def ancestors_of(chunk):
    """Of each token, from its root to itself, by position alone."""
    found, path = [], []
    for place, position in enumerate(chunk.positions.tolist()):
        path = [*path[:position], place]
        found.append(path)
    return found


@settings(deadline=None, max_examples=40)
@given(SEQUENCES, st.integers(12, 60))
def test_each_prediction_has_its_sequence_before_it(sequences, tokens):
    asked = asked_of(sequences)
    expected = {
        (each.ids[: place + 1], each.ids[place + 1], each.request)
        for each in asked
        for place in range(len(each.ids) - 1 - each.scored, len(each.ids) - 1)
    }
    found, chunks = [], list(chunks_of(asked, tokens))
    for chunk in chunks:
        ancestors = ancestors_of(chunk)
        triples = zip(chunk.places, chunk.targets, chunk.requests, strict=True)
        for place, target, request in triples:
            before = tuple(chunk.ids[ancestors[place]].tolist())
            found.append((before, int(target), int(request)))
        assert len(chunk) <= tokens
    assert len(found) == len(expected)
    assert set(found) == expected


@settings(deadline=None, max_examples=40)
@given(SEQUENCES)
def test_a_token_is_computed_once(sequences):
    (chunk,) = chunks_of(asked_of(sequences), 10_000)
    prefixes = {tuple(ids[: n + 1]) for ids in sequences for n in range(len(ids) - 1)}
    assert len(chunk) == len(prefixes)


def check_seen(pack, window, ancestors):
    """A tile's keys, ascending, each once, with a bit for each query that sees it."""
    seen, queries = pack.seen(window), [[] for _ in range(pack.start, pack.stop)]
    for tile, (start, stop) in enumerate(pairwise(seen.starts)):
        keys, lanes = seen.keys[start:stop], seen.lanes[start:stop]
        assert keys[lanes != 0].tolist() == sorted({*keys.tolist()})
        assert len(keys) % AT_ONCE == 0
        for key, bits in zip(pack.places[keys].tolist(), lanes, strict=True):
            for lane in range(min(LANES, len(queries) - LANES * tile)):
                if bits >> lane & 1:
                    queries[LANES * tile + lane].append(key)
    for query, found in enumerate(queries, pack.start):
        assert found == (ancestors[query][-window:] if window else ancestors[query])


@settings(deadline=None, max_examples=40)
@given(SEQUENCES, st.integers(1, 9), st.integers(1, 40), st.sampled_from([None, 1, 3]))
def test_spans_see_ancestors_within_the_window(sequences, queries, tokens, window):
    (chunk,) = chunks_of(asked_of(sequences), 10_000)
    ancestors, carried, stop = ancestors_of(chunk), torch.empty(0, dtype=torch.int64), 0
    packs = packs_of(chunk, tokens)
    for pack, spans in zip(packs, spans_of(chunk, packs, queries), strict=True):
        assert pack.start == stop
        stop, at = pack.stop, pack.start
        places = torch.cat([carried, torch.arange(pack.start, pack.stop)])
        assert torch.equal(pack.places, places)
        for span in spans:
            assert pack.start + span.start == at
            at = pack.start + span.stop
            keys, mask = places[span.keys], span.sight.mask(window, torch.float32)
            if mask is None:
                plain = torch.ones(span.stop - span.start, len(keys), dtype=torch.bool).tril()
                assert plain.shape[0] == plain.shape[1]
            else:
                assert mask.unique().tolist() in ([0.0], [-math.inf, 0.0])
                plain = mask == 0
            for row, query in zip(plain, range(pack.start + span.start, at), strict=True):
                seen = ancestors[query][-window:] if window else ancestors[query]
                assert keys[row].tolist() == seen
        assert at == pack.stop
        check_seen(pack, window, ancestors)
        carried = places[pack.kept]
    assert stop == len(chunk)
    assert len(carried) == 0


def test_short_beginnings_do_not_tie_trees_together(monkeypatch):
    monkeypatch.setattr(forest, "WORTH", 3)
    asked = [
        Asked((0, 1, 2, 3, 9), 1, 0),
        Asked((0, 1, 4, 5, 9), 1, 1),
        Asked((0, 1, 2, 6, 9), 1, 2),
    ]
    (chunk,) = chunks_of(asked)
    assert chunk.ids.tolist() == [0, 1, 2, 3, 6, 0, 1, 4, 5]
    assert chunk.positions.tolist() == [0, 1, 2, 3, 3, 0, 1, 2, 3]
    assert chunk.ends.tolist() == [5, 5, 5, 4, 5, 9, 9, 9, 9]


def test_one_token_choices_share_all_of_their_context():
    asked = [Asked((7, 8, answer), 1, number) for number, answer in enumerate((1, 2, 3))]
    (chunk,) = chunks_of(asked)
    assert (chunk.ids.tolist(), chunk.places.tolist()) == ([7, 8], [1, 1, 1])
    assert chunk.targets.tolist() == [1, 2, 3]


@settings(deadline=None, max_examples=25)
@given(SEQUENCES)
def test_leaves_are_the_sequences_that_begin_no_other(sequences):
    (chunk,) = chunks_of(asked_of(sequences), 10_000)
    inputs = {tuple(ids[:-1]) for ids in sequences}
    leaves = {a for a in inputs if not any(b != a and b[: len(a)] == a for b in inputs)}
    assert {tuple(chunk.ids[path].tolist()) for path in sequences_of(chunk)} == leaves


def test_a_chunk_is_named_by_all_of_it():
    """Its sums are by request: the same tokens for other requests are other sums."""
    names = {
        next(chunks_of([Asked((1, 2, last), 1, request)])).digest
        for last, request in ((3, 0), (3, 0), (3, 5), (4, 0))
    }
    assert len(names) == 3


@pytest.mark.parametrize(("ids", "scored"), [((1, 2), 2), ((1, 2), 0), ((1,), 1)])
def test_a_sequence_needs_a_token_to_predict_from(ids, scored):
    with pytest.raises(ValueError, match=f"{len(ids)} tokens cannot have {scored}"):
        Asked(ids, scored, 0)
