"""The text of a recipe: YAML of which nothing is dropped, and settings `key.path=value`.

A setting's key is a path of names; one that holds a dot stands in double quotes, and all that
follows `layers.` is one name, a layer's. Its value is YAML where it begins with a bracket, a brace
or a quote, and in it a `#` is refused that would begin a comment. Any other value is a number,
true, false, null, or text as it stands, with whatever `#`, colons and quotes are in it.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from dpq_core.errors import InputError, one_line


class RecipeError(InputError):
    """A recipe that cannot be run, with one line that says where and why."""


class _RepeatedKeyError(ValueError):
    """A key that a mapping has twice, of which YAML's readers keep the last."""


_STR, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}

_NAME = r'"[^"]*"|[^".]+'
_SETTING = re.compile(r'((?:"[^"]*"|[^"=])+)=(.*)', re.DOTALL)
_KEY = re.compile(rf"(?:{_NAME})(?:\.(?:{_NAME}))*")
_LAYERS = "layers."


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        RecipeError: no such file, not YAML, or a key that is given twice, with both lines.
    """
    try:
        return _constructed(yaml.SafeLoader(path.read_text("utf-8")))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise RecipeError(f"{path}: no such recipe") from error
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from error
    except _RepeatedKeyError as error:
        raise RecipeError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {one_line(error)}") from error


def parse_setting(setting: str) -> tuple[list[str], Any]:
    """The path of names and the value of `key.path=value`.

    Raises:
        RecipeError: not of that form, or a value that begins like YAML and is none.
    """
    found = _SETTING.fullmatch(setting)
    if not found or not _KEY.fullmatch(found[1]):
        raise RecipeError(
            f"override {setting!r} is not of the form key.path=value (a name with a dot in it:"
            ' key."a.b"=value)'
        )
    try:
        return _names(found[1]), _value(found[2].strip())
    except _RepeatedKeyError as error:
        raise RecipeError(f"override {setting!r}: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(
            f"override {setting!r} is not YAML ({one_line(error)}): put text that begins with a"
            " bracket, a brace or a quote, or holds ` #` within them, into quotes"
        ) from error


def _names(key: str) -> list[str]:
    if key.startswith(_LAYERS) and '"' not in key:
        return [_LAYERS[:-1], key.removeprefix(_LAYERS)]
    return [name.strip('"') for name in re.findall(_NAME, key)]


def _value(text: str) -> Any:
    if text[:1] in ("[", "{", '"', "'"):
        return _constructed(_Flow(text))
    loader = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    node = yaml.ScalarNode(tag if tag in _SCALARS else _STR, text)
    return loader.construct_document(node)


class _Flow(yaml.SafeLoader):
    """YAML without comments: a `#` at which one would begin is an error."""

    def scan_to_next_token(self) -> None:
        while self.peek() == " ":
            self.forward()
        if self.peek() != "#":
            super().scan_to_next_token()


def _constructed(loader: yaml.SafeLoader) -> Any:
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_repeated_keys(node, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_repeated_keys(node: yaml.Node, seen: set[int]) -> None:
    if id(node) in seen:  # an anchor's
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = (key.tag, str(key.value))
        if key.tag != _MERGE and name in lines:
            where = f"lines {lines[name]} and {line}" if lines[name] != line else f"line {line}"
            raise _RepeatedKeyError(f"{where}: {key.value!r} is given twice: keep one of them")
        lines[name] = line
        _refuse_repeated_keys(value, seen)
