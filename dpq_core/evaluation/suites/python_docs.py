"""The questions of the suite `python_docs`: which of four continuations is the true one?

From the held-out prose of the Python installation, without overlap: a context of about 48
characters and a continuation of about 24, both ending at a word's end, then a gap of about 64. The
three other choices are true continuations of other places, of about the same length. About 2,250
questions, so that a paired difference between two models is known to a fraction of a point; chance
is 25 %.
"""

import random
import re
from collections.abc import Iterator
from typing import Any, TypedDict

from dpq_core.data import python_corpus

CONTEXT_CHARACTERS = 48
CONTINUATION_CHARACTERS = 24
GAP_CHARACTERS = 64
CHOICES = 4

_SEED = 0
_NEIGHBOURS = 100  # candidates for a distractor: so many nearest in length
_WORD = re.compile(r"\S")
_SPACE = re.compile(r"\s")


class Question(TypedDict):
    context: str
    choices: list[str]
    gold: int


def questions() -> list[Question]:
    """All questions, always the same ones on the same Python version."""
    pairs = [pair for text in python_corpus.documents("validation") for pair in _pairs(text)]
    by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i][1]))
    rank = {index: place for place, index in enumerate(by_length)}
    rng = random.Random(_SEED)
    result: list[Question] = []
    for index, (context, continuation) in enumerate(pairs):
        start = min(max(rank[index] - _NEIGHBOURS // 2, 0), max(len(pairs) - _NEIGHBOURS, 0))
        near = [pairs[i][1] for i in by_length[start : start + _NEIGHBOURS]]
        others = {" ".join(text.split()): text for text in near}  # no two alike but for spaces
        others.pop(" ".join(continuation.split()), None)
        choices = rng.sample(list(others.values()), CHOICES - 1)
        gold = rng.randrange(CHOICES)
        choices.insert(gold, continuation)
        result.append(Question(context=context, choices=choices, gold=gold))
    return result


def dataset(**_: Any) -> dict[str, Any]:
    """For lm-evaluation-harness' `custom_dataset`: the questions as its split `test`."""
    import datasets  # seconds

    return {"test": datasets.Dataset.from_list([dict(question) for question in questions()])}


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """Contexts and their continuations, cut from the text one after the other."""
    end = -GAP_CHARACTERS
    while word := _WORD.search(text, end + GAP_CHARACTERS):
        begin = word.start()
        middle = _word_end(text, begin, CONTEXT_CHARACTERS)
        end = _word_end(text, middle, CONTINUATION_CHARACTERS) if middle else 0
        if not end:
            return
        if text[middle:end].strip():  # and not the spaces of an indented block
            yield text[begin:middle], text[middle:end]


def _word_end(text: str, begin: int, characters: int) -> int:
    """Where the word at `characters` after `begin` ends, or the last one before; 0 for nowhere."""
    space = _SPACE.search(text, begin + characters)
    return begin + len(text[begin : space.start()].rstrip()) if space else 0
