"""A recipe's file: YAML, settings by hand, and the folders that are meant relative to it.

Relative folders and files that exist beside the recipe are taken from there; anything else (a hub
id, `s3://…`) is left as it is written.
"""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dpq_core.paths import exists
from dpq_core.recipe.credentials import CREDENTIALS, credentials_in
from dpq_core.recipe.recipe import OURS, Recipe
from dpq_core.recipe.text import RecipeError, parse_setting, read_yaml

_Kind = TypeVar("_Kind", bound=BaseModel)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key.path=value` overrides (`dpq_core.recipe.text`).

    Raises:
        RecipeError: missing file, bad YAML, unknown field, or a value outside its limits.
    """
    return parse_recipe(read_recipe(path, overrides), str(path))


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """A recipe's content with its overrides, not yet validated.

    Raises:
        RecipeError: missing file, bad YAML, or an override that is none.
    """
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        found = type(content).__name__
        raise RecipeError(f"{path}: a recipe is a mapping of sections, not {found}")
    resolved: dict[str, Any] = _resolve_paths(content, path.parent)
    for override in overrides or []:
        _apply(resolved, override)
    return resolved


def parse_recipe(content: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe's content; `source` names it in errors."""
    return validated(Recipe, content, source)


def validated(kind: type[_Kind], content: dict[str, Any], source: str) -> _Kind:
    """Content as a recipe of some kind.

    Raises:
        RecipeError: the first field that is wrong, and why.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        shown = first["input"]
        value = f" (got {shown!r})" if not isinstance(shown, dict) else ""
        message = first["msg"].removeprefix(OURS)
        said = ": ".join(part for part in (source, where, message) if part)
        raise RecipeError(f"{said}{value}{more}") from error


def _apply(content: dict[str, Any], override: str) -> None:
    if CREDENTIALS.search(override):
        raise RecipeError(f"override {credentials_in(override.partition('=')[0])}")
    (*parents, last), value = parse_setting(override)
    section = content
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"override {override!r}: {parent} is a value, not a section")
    section[last] = _resolve_paths({last: value}, Path.cwd())[last]


_PATH_FIELDS = {"id", "data_files", "data_dir", "folder", "suites_path", "data_mirror"}


def _resolve_paths(node: Any, folder: Path, field: str = "") -> Any:
    if isinstance(node, dict):
        return {key: _resolve_paths(value, folder, key) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolve_paths(value, folder, field) for value in node]
    if field in _PATH_FIELDS and isinstance(node, str) and node and exists(folder / node):
        return str((folder / node).resolve())
    return node
