"""What MLflow reads in the folder of a model version: how to load it, with which packages, and what
it takes and gives (`MLmodel`, https://mlflow.org/docs/latest/ml/model)."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version

import yaml

MODEL = "MLmodel"
CODE = "code"  # folder
_REQUIREMENTS = "requirements.txt"
_PYTHON = "python_env.yaml"
FILES = (MODEL, CODE, _REQUIREMENTS, _PYTHON)  # all that is written


@dataclass(frozen=True)
class TextModel:
    """From text to text. loader: the module that MLflow asks for `_load_pyfunc`. package: folder of
    the package that it is in, which goes with the model. requirements: what that imports, by
    distribution. parameters: of a prediction, with their defaults."""

    loader: str
    package: Path
    requirements: Sequence[str]
    parameters: Mapping[str, int | float]


def write_flavor(folder: Path, model: TextModel) -> None:
    """Make `folder` a model of MLflow's, beside the files that it has. `MLmodel` goes first and
    comes last: who finds it finds all of it. Versions are those that are installed here."""
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    (folder / MODEL).unlink(missing_ok=True)
    code = folder / CODE / model.package.name
    shutil.rmtree(code, ignore_errors=True)
    shutil.copytree(model.package, code, ignore=shutil.ignore_patterns("__pycache__"))
    pinned = [f"{name}=={_public(name)}" for name in ("mlflow", *model.requirements)]
    (folder / _REQUIREMENTS).write_text("\n".join(pinned) + "\n", "utf-8")
    python = {"python": python_version(), "dependencies": [f"-r {_REQUIREMENTS}"]}
    (folder / _PYTHON).write_text(yaml.safe_dump(python), "utf-8")
    text = Schema([ColSpec("string")])
    kinds = {int: "long", float: "double"}
    parameters = [ParamSpec(n, kinds[type(v)], v) for n, v in model.parameters.items()]
    described = Model(signature=ModelSignature(text, text, ParamSchema(parameters)))
    add_to_model(described, model.loader, code=CODE, python_env=_PYTHON)
    partial = folder / f".{MODEL}"
    described.save(partial)
    partial.replace(folder / MODEL)


def _public(distribution: str) -> str:
    """Its version as an index knows it: torch's own names the device too."""
    return version(distribution).partition("+")[0]
