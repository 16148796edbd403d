"""Whose a folder is: a store is marked when it is made, and no other folder is written to as one.

    <root>/.dpq-store      `format 1`; empty: made by hand, or by a process that was killed

Stores of releases that did not mark them yet are known by what is in them: folders alone, ours and
those of stages, whose entries begin with a key.
"""

import re
from pathlib import Path

MARKER = ".dpq-store"
OURS = ("tmp", "leases", "runs", "registries")  # folders of a store that are no stages
_DOWNLOADS = "downloads"  # of `tasks.support.model`: begun, one a key
_FORMAT = "format 1"
_KEY = re.compile(r"[0-9a-f]{64}")


class StoreError(RuntimeError):
    """A folder that is not to be used as a store, or an artifact in one that is not what its
    reference says, with the way out."""


def mark(root: Path) -> None:
    """Make a store of a folder that is empty or not there yet; one that is a store stays as it is.

    Raises:
        StoreError: there is something else in it, or a store of a later release.
    """
    if _marked(root):
        return
    root.mkdir(parents=True, exist_ok=True)
    # Of two that make it, one may see the other's folders: the marker was there before them.
    if any(root.iterdir()) and not _made_before_markers(root) and not _marked(root):
        raise StoreError(
            f"{root}: not empty, and no store of dpq's ({MARKER} is missing), so nothing is written"
            f" there: name a new folder, or if it is one say so: touch '{root / MARKER}'"
        )
    (root / MARKER).write_text(_FORMAT, "utf-8")


def is_store(root: Path) -> bool:
    """Whether a folder is a store.

    Raises:
        StoreError: of a later release.
    """
    try:
        return _marked(root) or _made_before_markers(root)
    except OSError:  # not there, or not for us to look into
        return False


def _marked(root: Path) -> bool:
    try:
        said = (root / MARKER).read_text("utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if said not in ("", _FORMAT):
        raise StoreError(
            f"{root / MARKER}: {said[:40]!r} is unknown: this release reads {_FORMAT!r}; use"
            " another execution.store"
        )
    return True


def _made_before_markers(root: Path) -> bool:
    artifact = False
    for folder in root.iterdir():
        if not folder.is_dir():
            return False
        if folder.name in OURS:
            continue
        for path in folder.iterdir():
            if not path.name.startswith(".") and not _KEY.match(path.name):
                return False
            artifact |= folder.name != _DOWNLOADS and (path / ".artifact.json").is_file()
    return artifact
