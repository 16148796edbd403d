"""Documents that choose, and documents that judge: one half each, by the document's own name.

Repair looks at a candidate's scores, changes it, and looks again. Were these the scores that judge
it, each look would be another chance to pass (`docs/verdict.md` has the numbers). So what chooses
reads one half of the documents and windows, and the gates judge the other half, once. Error rates
can be spent over several looks only where there is one; the difference itself has none.

    chooses(document)  ⇔  the first bit of SHA-256(document's name) is 0

A document's name is the digest of its content, and the rule depends on nothing else: not on order,
suite or limit. A document that occurs twice is in the same half both times, and every run, of every
model, has the same halves.
"""

import hashlib
from dataclasses import fields, replace
from typing import Any

from dpq_core.evaluation.scores import Scores
from dpq_core.evaluation.text_divergence import TextDivergence
from dpq_core.verdict.pairing import Evaluation

ALL = "all documents and windows"
CHOOSING = "the half of them that chooses (first bit of SHA-256 is 0)"
JUDGING = "the half of them that chose nothing (first bit of SHA-256 is 1)"


def chooses(document: str) -> bool:
    """Whether a document is of the half that chooses."""
    return hashlib.sha256(document.encode()).digest()[0] < 0x80


def those(evaluation: Evaluation, which: str) -> Evaluation:
    """Scores of the documents that `which` (ALL, CHOOSING or JUDGING) says."""
    if which == ALL:
        return evaluation
    return {
        name: _some(found, which == CHOOSING) if isinstance(found, Scores) else found
        for name, found in evaluation.items()
    }


def windows_of(found: TextDivergence, which: str) -> TextDivergence:
    """The divergence of those windows."""
    if which == ALL:
        return found
    choosing = which == CHOOSING
    places = [n for n, name in enumerate(found.windows) if chooses(name) == choosing]
    return found.some(places)


def _some(scores: Scores, choosing: bool) -> Scores:
    """`truncated` stays that of all: requests are counted, not named."""
    places = [place for place, name in enumerate(scores.documents) if chooses(name) == choosing]
    columns = {field.name: getattr(scores, field.name) for field in fields(scores)}
    chosen: dict[str, Any] = {
        name: [column[place] for place in places]
        for name, column in columns.items()
        if isinstance(column, list) and column
    }
    return replace(scores, **chosen)
