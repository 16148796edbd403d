"""Settings that belong to the installation and not to a recipe."""

import os
from pathlib import Path


def home() -> Path:
    """Folder of the embedded services, their logs and databases: `DPQ_HOME`, or `.dpq` here."""
    return Path(os.environ.get("DPQ_HOME", ".dpq"))


def recipe_roots() -> list[Path]:
    """Folders from which a deployment takes recipes besides the shipped ones: `DPQ_RECIPE_ROOTS`,
    separated as in `PATH`; none by default."""
    return [Path(each) for each in os.environ.get("DPQ_RECIPE_ROOTS", "").split(os.pathsep) if each]


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
