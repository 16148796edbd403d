"""What of a folder goes to others: to a bucket, or to a hub."""

from pathlib import Path

# MLflow's, in the folder that it loaded a registered version from.
_OF_MLFLOW = "registered_model_meta"


def files_to_send(folder: Path) -> dict[str, Path]:
    """Name → file of what a folder holds for others: without what is hidden, and what Python and
    MLflow leave beside what they loaded from there."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and not _left_by_loading(path)
    }


def _left_by_loading(path: Path) -> bool:
    return path.parent.name == "__pycache__" or path.name == _OF_MLFLOW
