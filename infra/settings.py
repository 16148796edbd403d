"""Settings that belong to the installation and not to a recipe."""

import os
from pathlib import Path


def home() -> Path:
    """Folder of the embedded services, their logs and databases: `DPQ_HOME`, or `.dpq` here."""
    return Path(os.environ.get("DPQ_HOME", ".dpq"))
