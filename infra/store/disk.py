"""A full disk, however a library says so."""

import errno
import shutil
from pathlib import Path

_CODES = (errno.ENOSPC, errno.EDQUOT)
# Of libraries that pass on a text (safetensors, pyarrow, SQLite), lower case.
_TEXTS = ("no space left on device", "disk quota exceeded", "disk is full")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a disk is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _CODES:
            return True
        if any(text in str(error).lower() for text in _TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def space_left(folder: Path) -> str:
    """`12.3 MB free of 4.0 GB`, on the file system of a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return f"{shown_bytes(usage.free)} free of {shown_bytes(usage.total)}"


def shown_bytes(count: float) -> str:
    """Bytes as people read them: `517 B`, `12.3 MB`."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if count < 1000:
            break
        count, unit = count / 1000, larger
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
