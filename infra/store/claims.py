"""What this machine has once, and one run at a time: its devices, by name.

    <temporary folder>/dpq-claims/<name>      locked (flock) by the process that has it

The lock is the operating system's: it ends with its process, however that ends. So runs, and
workers of a cluster that nobody coordinates, never take each other's.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path


class Claim:
    """A name that is ours until `release`, or until this process ends."""

    def __init__(self, name: str, file: int) -> None:
        self.name = name
        self._file: int | None = file

    def release(self) -> None:
        """Let others have it. Twice is fine."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def claims(names: Iterable[str]) -> Iterator[Claim]:
    """Claims on those of some names that are free when it is their turn."""
    folder = Path(tempfile.gettempdir(), "dpq-claims")
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        with suppress(PermissionError):  # another user's, made just now
            folder.chmod(0o1777)
    for name in names:
        file = _opened(folder / re.sub(r"[^\w.-]", "_", name))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
        else:
            yield Claim(name, file)


def _opened(path: Path) -> int:
    """A file that nobody need write to have it locked, whoever made it."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CREAT, 0o644)
