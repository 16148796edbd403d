"""What of a folder goes to others: to a bucket, or to a hub."""

from pathlib import Path


def files_to_send(folder: Path) -> dict[str, Path]:
    """Name → file of what a folder holds for others: without what is hidden, and what Python keeps
    beside code that was loaded from there."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.parent.name != "__pycache__"
    }
