"""Prose that every Python installation carries, as a small text corpus.

Documents are the docstrings and block comments of one standard-library module, or one of the
language topics in `pydoc_data`. They are split into ``train`` and ``validation`` by a hash of the
top-level module's name, so that no module contributes to both and a module keeps its side whatever
the Python version. The text itself differs between Python versions; nothing may rely on its bytes
beyond one machine.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

SPLITS = ("train", "validation")

# Installed packages, test suites (absent from many distributions) and generated tables.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
_VALIDATION_SHARE = 6  # one name in so many
_MIN_CHARACTERS = 200
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n){2,}", re.MULTILINE)
_PROSE_SHARE = 0.8  # letters and spaces: leaves out commented code and rulers


def documents(split: str) -> list[str]:
    """The corpus' documents of one split, in a fixed order.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: choose one of {', '.join(SPLITS)}")
    return list(_documents(split))


@cache  # a few megabytes; parsing the standard library takes seconds
def _documents(split: str) -> tuple[str, ...]:
    texts = [*_module_texts(split), *_topic_texts(split)]
    return tuple(text for text in texts if len(text) >= _MIN_CHARACTERS)


def _split_of(name: str) -> str:
    held_out = hashlib.sha256(name.encode()).digest()[0] % _VALIDATION_SHARE == 0
    return "validation" if held_out else "train"


def _topic_texts(split: str) -> Iterator[str]:
    for topic, text in sorted(topics.items()):
        if _split_of(f"topic {topic}") == split:
            yield text.strip()


def _module_texts(split: str) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and _split_of(parts[0].removesuffix(".py")) == split:
            yield _module_prose(path)


def _module_prose(path: Path) -> str:
    """Docstrings, then block comments of two lines or more, each in order of appearance."""
    try:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return ""  # deliberately broken sources that some distributions ship
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    docstrings = [text for node in nodes if (text := ast.get_docstring(node))]
    return "\n\n".join([*docstrings, *_comment_blocks(source)])


def _comment_blocks(source: str) -> Iterator[str]:
    for block in _COMMENT_BLOCK.findall(source):
        text = "\n".join(line.strip().lstrip("#").strip() for line in block.splitlines()).strip()
        if sum(c.isalpha() or c.isspace() for c in text) > _PROSE_SHARE * len(text):
            yield text
