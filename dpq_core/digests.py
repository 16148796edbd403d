"""Names for content: of values, of files, and of the code that computes a stage's output."""

import ast
import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(path: Path) -> list[int]:
    """What changes whenever a file's content does, without reading it: size, time of its last
    change, and what no copy preserves (`cp -p`, `tar`, `rsync -t` set the time of the content):
    the time at which anything of the file was changed last, and which file of the disk it is."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON in the one way that the same content gives the same bytes."""
    path.write_text(json.dumps(content, indent=indent, sort_keys=True) + "\n")


def code_digest(module: str) -> str:
    """SHA-256 (hex) of a module's source and of all that it imports from its own package.

    For a run's record of what code it ran. Cache keys have versions of arithmetic instead
    (`tasks/support/stages.py`): a comment changes no result.
    """
    with _PARSING:
        return _code_digest(module)


# CPython 3.11 fails now and then ("AST constructor recursion depth mismatch") when two threads
# parse at once, as layers in a thread pool would.
_PARSING = Lock()


@cache
def _code_digest(module: str) -> str:
    package = module.partition(".")[0]
    sources: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        spec = importlib.util.find_spec(name)
        if name in sources or spec is None or spec.origin is None:
            continue
        sources[name] = Path(spec.origin).read_text("utf-8")
        waiting += _imports_of(sources[name], package)
    return digest(sources)


def _imports_of(source: str, package: str) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] == package and _is_module(name)]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a class or function: its parent is no package
        return False
