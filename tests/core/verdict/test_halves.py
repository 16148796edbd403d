"""Documents that choose do not judge: halves that depend on a document's name alone."""

import hashlib
import json
import random

import pytest

from dpq_core.evaluation.scores import Scores
from dpq_core.recipe import GatesSection
from dpq_core.verdict.comparison import compare
from dpq_core.verdict.gates import judge
from dpq_core.verdict.halves import ALL, CHOOSING, JUDGING, chooses, those
from dpq_core.verdict.pairing import Failure


def scores(values, name=""):
    count = len(values)
    documents = [hashlib.sha256(f"{name}{n}".encode()).hexdigest() for n in range(count)]
    return Scores("acc", documents, ["p"] * count, ["g"] * count, values, [1.0] * count, 3)


def test_the_halves_are_apart_and_make_the_whole():
    found = scores([float(n % 2) for n in range(1000)])
    parts = [those({"suite": found}, which)["suite"] for which in (CHOOSING, JUDGING)]
    assert {*parts[0].documents}.isdisjoint(parts[1].documents)
    rows = {row for part in parts for row in zip(part.documents, part.values, strict=True)}
    assert rows == set(zip(found.documents, found.values, strict=True))
    assert 440 < len(parts[0]) < 560
    assert all((part.metric, part.truncated) == ("acc", 3) for part in parts)
    assert those({"suite": found}, ALL)["suite"] is found


def test_a_document_is_on_the_same_side_whatever_stands_around_it():
    names = scores([0.0] * 500).documents
    side = {name: chooses(name) for name in names}
    random.Random(0).shuffle(names)
    assert {name: chooses(name) for name in names[:250]}.items() <= side.items()
    assert [chooses(name) for name in "0123"] == [True, True, False, True]  # for good


def test_a_failure_stays_one():
    failure = Failure("failed: out of memory")
    assert those({"suite": failure}, JUDGING) == {"suite": failure}


@pytest.mark.parametrize(("which", "expected"), [(CHOOSING, "rejected"), (JUDGING, "promoted")])
def test_what_is_judged_is_what_the_verdict_says(which, expected):
    """All documents that choose turned wrong, of those that judge none."""
    before = scores([1.0] * 400)
    after = scores([0.0 if chooses(name) else 1.0 for name in before.documents])
    differences = compare(*(those({"s": each}, which) for each in (before, after)))
    verdict = judge(differences, {}, GatesSection(), None, judged_on=which)
    assert verdict.verdict == expected
    assert json.loads(json.dumps(verdict.as_dict()))["judged_on"] == which
