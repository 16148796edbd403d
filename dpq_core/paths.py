"""Whether something is there, of texts that people wrote: too long for a name, or within a folder
that is closed to us, is "no", and no error."""

from pathlib import Path


def exists(path: str | Path) -> bool:
    """A file or folder that we can see."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def is_folder(path: str | Path) -> bool:
    """A folder that we can see."""
    return exists(path) and Path(path).is_dir()


def is_file(path: str | Path) -> bool:
    """A file that we can see."""
    return exists(path) and Path(path).is_file()
