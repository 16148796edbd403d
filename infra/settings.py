"""Settings that belong to the installation and not to a recipe."""

import os
from pathlib import Path


def home() -> Path:
    """Folder of the embedded services, their logs and databases: `DPQ_HOME`, or `.dpq` here."""
    return Path(os.environ.get("DPQ_HOME", ".dpq"))


def recipe_roots() -> list[Path]:
    """Folders from which a deployment takes recipes besides the shipped ones: `DPQ_RECIPE_ROOTS`,
    separated as in `PATH`; none by default."""
    return _folders("DPQ_RECIPE_ROOTS")


def setting_roots() -> list[Path]:
    """Folders in which a deployment's settings may name models and data, besides those of recipes:
    `DPQ_SETTING_ROOTS`, separated as in `PATH`; none by default."""
    return _folders("DPQ_SETTING_ROOTS")


def _folders(variable: str) -> list[Path]:
    return [Path(each) for each in os.environ.get(variable, "").split(os.pathsep) if each]


def setting_addresses() -> list[str]:
    """Patterns of the addresses, and hub ids as `hub:<id>`, that a deployment's settings may name:
    `DPQ_SETTING_ADDRESSES`, separated by spaces, `*` for any text; by default ids of the hub."""
    return os.environ.get("DPQ_SETTING_ADDRESSES", "hub:*/*").split()


def mlflow_page() -> str | None:
    """Where a browser reaches MLflow, if not where we do: `DPQ_MLFLOW_PAGE`."""
    return os.environ.get("DPQ_MLFLOW_PAGE") or None


def destination() -> str | None:
    """Where releases go whose recipe does not say: `DPQ_DESTINATION` (`s3://…`)."""
    return os.environ.get("DPQ_DESTINATION") or None


def remote_code_allowed() -> bool:
    """Whether a deployment runs checkpoints' own code where a recipe trusts it:
    `DPQ_ALLOW_REMOTE_CODE=1`; not by default."""
    return os.environ.get("DPQ_ALLOW_REMOTE_CODE") == "1"


def signing_key() -> Path | None:
    """Ed25519 key (PEM) that statements about engines are signed by: `DPQ_SIGNING_KEY`."""
    path = os.environ.get("DPQ_SIGNING_KEY")
    return Path(path) if path else None
