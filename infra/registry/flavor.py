"""What MLflow reads in the folder of a model version: how to load it, with which packages, and what
it takes and gives (`MLmodel`, https://mlflow.org/docs/latest/ml/model)."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version

import yaml
from filelock import FileLock

from infra.outgoing import files_to_send

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
    """Make `folder` a model of MLflow's, beside the files that it has, if it is not this one
    already. `MLmodel` goes first and comes last: who finds it finds all of it. Versions are those
    that are installed here. Of several runs one writes at a time."""
    with FileLock(folder / f".{MODEL}.lock"):
        if not _is_there(folder, model):
            _write(folder, model)


def _is_there(folder: Path, model: TextModel) -> bool:
    files = [folder / MODEL, folder / _REQUIREMENTS, folder / _PYTHON]
    if not all(path.is_file() for path in files):
        return False
    same = (folder / _REQUIREMENTS).read_text("utf-8") == _requirements(model)
    return same and _code(folder / CODE / model.package.name) == _code(model.package)


def _code(package: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files_to_send(package).items()}


def _requirements(model: TextModel) -> str:
    names = ("mlflow", *model.requirements)
    return "".join(f"{name}=={_public(name)}\n" for name in names)


def _write(folder: Path, model: TextModel) -> None:
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    (folder / MODEL).unlink(missing_ok=True)
    code = folder / CODE / model.package.name
    shutil.rmtree(code, ignore_errors=True)
    shutil.copytree(model.package, code, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / _REQUIREMENTS).write_text(_requirements(model), "utf-8")
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
