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


def remote_code_allowed() -> bool:
    """Whether a deployment runs checkpoints' own code where a recipe trusts it:
    `DPQ_ALLOW_REMOTE_CODE=1`; not by default."""
    return os.environ.get("DPQ_ALLOW_REMOTE_CODE") == "1"
