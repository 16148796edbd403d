"""What a deployment's form asks for: a recipe, the common fields of it, and settings by hand.

The common fields are a table; types, bounds and help are those of the recipe's own fields. What is
left empty stays as the recipe says. A deployment runs on a machine that is not its caller's: it
takes recipes from there only that are shipped or lie in `DPQ_RECIPE_ROOTS`, settings of the fields
that are open (`flows.deployments.doors`), and a checkpoint's own code only where
`DPQ_ALLOW_REMOTE_CODE` says so.
"""

import json
import os
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model, model_serializer
from pydantic.json_schema import SkipJsonSchema

from dpq_core.paths import is_file
from dpq_core.recipe import Recipe, RecipeError, load_recipe, read_recipe
from flows.deployments.doors import SHIPPED, check_settings, is_open, limits_of
from infra.settings import recipe_roots, remote_code_allowed

_EXACT = ConfigDict(extra="forbid")

COMMON: dict[str, tuple[str, ...]] = {  # section of a recipe → fields
    "model": ("id", "revision"),
    "scheme": ("method", "order", "rounding", "group_size", "fp8_max", "activations"),
    "calibration": ("samples", "sequence_length", "propagation", "correction"),
    "evaluation": ("suites", "limit"),
    "gates": (
        "perplexity_increase",
        "accuracy_drop",
        "confidence",
        "approval",
        "approval_timeout",
    ),
    "repair": ("enabled", "max_rounds", "max_bits_per_weight"),
    "execution": ("runner", "workers", "device"),
}


class _Form(BaseModel):
    """Fields that may be left empty, and are then not there at all: for a field that may also be
    null, Prefect's form asks first which of the two it shall be."""

    model_config = _EXACT

    @model_serializer(mode="wrap")
    def _filled(self, handler: Any) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


def _section(name: str, fields: tuple[str, ...]) -> Any:
    """The open fields of a recipe's section, each of which may be left empty."""
    section: Any = Recipe.model_fields[name].annotation
    optional: dict[str, Any] = {}
    for field in fields:
        if not is_open(f"{name}.{field}"):
            continue
        info = section.model_fields[field]
        kind = _without_none(info.annotation)
        for bound in info.metadata:
            kind = Annotated[kind, bound]
        said = "; ".join(filter(None, [_help(info), limits_of(f"{name}.{field}")]))
        shown = Field(None, title=field, description=said, json_schema_extra=_in_a_form)
        optional[field] = (kind | SkipJsonSchema[None], shown)  # type: ignore[misc]
    return create_model(name, __base__=_Form, **optional)


def _without_none(kind: Any) -> Any:
    kinds = get_args(kind)
    if NoneType not in kinds:
        return kind
    return reduce(or_, (each for each in kinds if each is not NoneType))


def _help(info: Any) -> str:
    """A field's description and bounds."""
    bounds = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    said = [
        f"{words} {getattr(bound, name):g}"
        for bound in info.metadata
        for name, words in bounds.items()
        if hasattr(bound, name)
    ]
    return "; ".join([info.description, *said])


def _in_a_form(schema: dict[str, Any]) -> None:
    """No default, and a list to choose from for a switch, which is never empty."""
    del schema["default"]
    if schema.get("type") == "boolean":
        del schema["type"]
        schema["enum"] = [True, False]


_sections: dict[str, Any] = {name: _section(name, fields) for name, fields in COMMON.items()}
_empty: dict[str, Any] = {name: (section, section()) for name, section in _sections.items()}
_Common: Any = create_model("Common", __base__=_Form, **_empty)


class Overrides(_Common):
    """Common fields of a recipe; what is left empty stays as the recipe says."""

    def settings(self) -> list[str]:
        """The same as `key.path=value`, of what is not empty."""
        return [
            f"{section}.{field}={json.dumps(value, ensure_ascii=False)}"
            for section, fields in self.model_dump(mode="json").items()
            for field, value in fields.items()
        ]


@cache
def shipped() -> dict[str, Path]:
    """The recipes of language models that come with this installation, by name."""
    paths = sorted(SHIPPED.glob("*.yaml"))
    return {path.stem: path for path in paths if "model" in read_recipe(path)}


class _Offer:
    """In a form: a list to choose from, and a free field. (Prefect drops what a `Field` says of a
    parameter, and takes its help from the flow's docstring.)"""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        kind = handler(core)["type"]
        offered = {"title": "shipped", "type": kind, "enum": list(shipped())}
        return {"anyOf": [offered, {"title": "file", "type": kind}]}


RecipeName = Annotated[str, _Offer()]


class Asked(BaseModel):
    """A recipe with settings: an entry of a watch list."""

    model_config = _EXACT

    recipe: RecipeName = Field(description="shipped, by name, or a file in DPQ_RECIPE_ROOTS")
    settings: list[str] = Field([], description="key.path=value of any open field")


def admitted(name: str, settings: list[str]) -> Recipe:
    """The recipe of a deployment's run.

    Raises:
        RecipeError: not to be had here, not to be set or run here, or no recipe.
    """
    path = _path(name)
    recipe = load_recipe(path, settings)
    check_settings(path, settings)
    if recipe.model.trust_remote_code and not remote_code_allowed():
        raise RecipeError(
            f"{name}: model.trust_remote_code is set, and this deployment runs no checkpoint's own"
            " code: leave it out, or set DPQ_ALLOW_REMOTE_CODE=1 where the worker runs"
        )
    return recipe


def _path(name: str) -> Path:
    known, roots = shipped(), recipe_roots()
    if name in known:
        return known[name]
    for root in (SHIPPED, *roots):
        path = (root / name).resolve()  # an absolute name stands for itself
        if path.is_relative_to(root.resolve()) and is_file(path):
            return path
    folders = os.pathsep.join(map(str, roots)) or "empty"
    raise RecipeError(
        f"recipe {name!r} is none that this deployment takes: shipped are {', '.join(known)};"
        f" files count only in DPQ_RECIPE_ROOTS ({folders}), links followed"
    )
