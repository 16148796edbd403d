"""Doors: what a deployment's caller may set of a recipe, who is not at the machine that runs it.

Numbers, switches and choices are free: no path or address fits into them. A field that holds text
is closed, unless the table below says what it may be. A recipe's own text is its author's, who can
write to the folder that it lies in; what counts is what the settings change in it, however they are
written.

A text that names data is a hub id, an address or a path: ids (as `hub:<id>`) and addresses have to
match `DPQ_SETTING_ADDRESSES`, and paths, links followed, to lie beside shipped recipes, in
`DPQ_RECIPE_ROOTS` or in `DPQ_SETTING_ROOTS`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from dpq_core.recipe import Recipe, RecipeError, read_recipe
from infra import settings

SHIPPED = Path(__file__).parents[2] / "recipes"

_BUILDERS = ("arrow", "csv", "imagefolder", "json", "parquet", "python_docs", "text")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:|.*(://|::)", re.DOTALL)
# In an address what a client reads otherwise than it stands: `..`, its escapes, a second address.
_DOUBTFUL = re.compile(r"[\s\\@%]|::|(^|/)\.\.(/|$)")

Rule = Callable[[str], str | None]  # a text → None, or why it is refused


def _anything(_text: str) -> None:
    return None


def _an_address(text: str) -> str | None:
    patterns = settings.setting_addresses()
    if not _DOUBTFUL.search(text) and any(fnmatchcase(text, each) for each in patterns):
        return None
    return f"matches none of DPQ_SETTING_ADDRESSES ({' '.join(patterns) or 'empty'})"


def _data(text: str) -> str | None:
    if _ADDRESS.match(text):
        return _an_address(text)
    if _HUB_ID.fullmatch(text) and not Path(text).exists() and ".." not in text:
        return _an_address(f"hub:{text}")
    roots = [*settings.recipe_roots(), *settings.setting_roots()]
    return _lies_in(text, roots, "DPQ_RECIPE_ROOTS and DPQ_SETTING_ROOTS")


def _data_set(text: str) -> str | None:
    return None if text in _BUILDERS and not Path(text).exists() else _data(text)


def _code(text: str) -> str | None:
    """Where whoever writes to may run code."""
    return _lies_in(text, settings.recipe_roots(), "DPQ_RECIPE_ROOTS")


def _lies_in(text: str, roots: list[Path], variables: str) -> str | None:
    path = Path(text).resolve()
    inside = any(path.is_relative_to(root.resolve()) for root in (SHIPPED, *roots))
    if inside and not text.startswith("~"):  # which other libraries expand
        return None
    return f"lies in no folder of {variables} ({':'.join(map(str, roots)) or 'empty'})"


_TEXTS_OF_A_DATA_SET: dict[str, Rule] = {
    "path": _data_set,
    "data_files": _data,
    "name": _anything,
    "split": _anything,
    "text_column": _anything,
    "messages_column": _anything,
    "revision": _anything,
}

TEXTS: dict[str, Rule] = {  # all others that hold text are closed
    "model.id": _data,
    "model.revision": _anything,
    "layers": _anything,
    **{f"calibration.dataset.{field}": rule for field, rule in _TEXTS_OF_A_DATA_SET.items()},
    **{f"calibration.activations.dataset.{f}": rule for f, rule in _TEXTS_OF_A_DATA_SET.items()},
    "calibration.image_column": _anything,
    **{f"evaluation.perplexity.dataset.{f}": rule for f, rule in _TEXTS_OF_A_DATA_SET.items()},
    "evaluation.suites": _anything,
    "evaluation.suites_path": _code,
    "evaluation.data_mirror": _data,
    "evaluation.num_fewshot": _anything,
    "repair.candidates": _anything,
    "registry.name": _anything,
    "registry.experiment": _anything,
    "registry.destination": _an_address,
    "execution.dask_address": _an_address,
    "execution.resources": _anything,
    "execution.device": _anything,
    "execution.devices": _anything,
    "variants": _anything,
}


def check_settings(path: Path, overrides: list[str]) -> None:
    """Refuse what settings change in a recipe that is not theirs to change.

    Raises:
        RecipeError: naming the field, the value, and what opens it. An override that is none.
    """
    before, after = read_recipe(path), read_recipe(path, overrides)
    for field, value in _changed(before, after):
        rule = _rule(field)
        if rule is None:
            raise RecipeError(
                f"{field} is closed to a deployment's settings: write it in a recipe of a folder in"
                " DPQ_RECIPE_ROOTS"
            )
        for text in _strings(value):
            _refuse(field, text, rule(text))


def check_source(parameter: str, text: str | None) -> None:
    """Refuse a checkpoint that a caller names outside of a recipe.

    Raises:
        RecipeError: naming the parameter, the value, and what opens it.
    """
    if text is not None:
        _refuse(parameter, text, _data(text))


def is_open(field: str) -> bool:
    """Whether a caller may set a field, to something at least."""
    return _rule(field) is not None


def limits_of(field: str) -> str:
    """What a form says of an open field besides its help; nothing where anything goes."""
    opened = "what DPQ_SETTING_ADDRESSES and DPQ_SETTING_ROOTS open"
    return opened if _rule(field) in (_data, _data_set) else ""


def _refuse(field: str, text: str, reason: str | None) -> None:
    if reason is not None:
        raise RecipeError(f"{field}: {text!r} {reason}: name it there, where the worker runs")


def _rule(field: str) -> Rule | None:
    """The rule of a field, by its whole name, or by that of the mapping that it is in."""
    if field.startswith("registry.hub"):  # its `private`, too: who may see what is pushed
        return None
    for name, rule in TEXTS.items():
        if field == name or field.startswith(f"{name}."):
            return rule
    return None if _holds_text(_annotation(field)) else _anything


def _annotation(field: str) -> Any:
    """The type of a recipe's field; Any where it has none of that name."""
    kind: Any = Recipe
    for part in field.split("."):
        models = [each for each in _kinds(kind) if isinstance(each, type)]
        model = next((each for each in models if issubclass(each, BaseModel)), None)
        if part == "preset" and model and field == "scheme.preset":
            return Literal["preset"]  # a name of a table, which its validator knows
        if model is None or part not in model.model_fields:
            return Any
        kind = model.model_fields[part].annotation
    return kind


def _kinds(annotation: Any) -> Iterator[Any]:
    """A type, or those that it is a union of."""
    if get_origin(annotation) in (Union, UnionType):
        for each in get_args(annotation):
            yield from _kinds(each)
    else:
        yield annotation


def _holds_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return False
    if annotation in (int, float, bool, NoneType):
        return False
    inner = get_args(annotation)
    if inner:
        return any(_holds_text(each) for each in inner if each is not Ellipsis)
    return not (isinstance(annotation, type) and issubclass(annotation, BaseModel))


def _changed(before: Any, after: Any, field: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of `after` that `before` has otherwise or not at all, and None for those gone."""
    if before == after:
        return
    if isinstance(after, dict) or isinstance(before, dict):
        old = before if isinstance(before, dict) else {}
        new = after if isinstance(after, dict) else {}
        if isinstance(after, dict) or after is None:
            for key in dict.fromkeys([*old, *new]):
                name = f"{field}.{key}" if field else str(key)
                yield from _changed(old.get(key), new.get(key), name)
            return
    yield field, after


def _strings(value: Any) -> Iterable[str]:
    """All texts of a leaf; of a mapping's keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _strings(key)
            yield from _strings(each)
