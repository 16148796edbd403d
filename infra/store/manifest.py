"""What an artifact consists of: its `.artifact.json` has SHA-256 and size of every other file."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from infra.store.marker import StoreError

MANIFEST = ".artifact.json"
USED = ".used"
_FORMAT_VERSION = 1
_LARGE, _HASHING = 64 << 20, 8  # bytes, cores


@dataclass(frozen=True)
class Manifest:
    """files: size and SHA-256 by name. sha256: of the manifest itself, hence of the content."""

    files: dict[str, tuple[int, str]]
    sha256: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    @classmethod
    def write(cls, folder: Path) -> Self:
        """Write the manifest of all files that a folder has now."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {
            str(path.relative_to(folder)): {"sha256": sha256, "size": path.stat().st_size}
            for path, sha256 in _file_digests(paths).items()
        }
        manifest = {"format_version": _FORMAT_VERSION, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        (folder / USED).touch()
        return cls.read(folder)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """A folder's.

        Raises:
            FileNotFoundError: there is none. ValueError, KeyError: it is damaged.
            StoreError: of a later release.
        """
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
        if manifest.get("format_version") != _FORMAT_VERSION:
            raise StoreError(
                f"{folder / MANIFEST}: format version {manifest.get('format_version')} is unknown: "
                f"this release reads {_FORMAT_VERSION}; use another execution.store"
            )
        files = {name: (each["size"], each["sha256"]) for name, each in manifest["files"].items()}
        return cls(files, hashlib.sha256(content).hexdigest())

    def has_sizes_of(self, folder: Path) -> bool:
        """Whether every file is there, with as many bytes."""
        return all(_size(folder / name) == size for name, (size, _) in self.files.items())

    def problems(self, folder: Path) -> list[str]:
        """What is wrong with a folder's files, a line each; every byte is read."""
        paths = {name: folder / name for name in self.files}
        digests = _file_digests(list(paths.values()))
        wrong = []
        for name, (size, sha256) in self.files.items():
            path, found = paths[name], _size(paths[name])
            if path not in digests or found < 0:
                wrong.append(f"{path}: missing")
            elif found != size:
                wrong.append(f"{path}: {found} bytes, {size} in the manifest")
            elif digests[path] != sha256:
                wrong.append(f"{path}: content differs from the manifest")
        return wrong


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    """Bytes of a file; -1: there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _file_digests(paths: list[Path]) -> dict[Path, str]:
    """Digests of those of several files that are there; of large ones by several cores."""
    if len(paths) < 2 or sum(_size(path) for path in paths) < _LARGE:
        digests = [_digest_or_none(path) for path in paths]
    else:
        with ThreadPoolExecutor(min(len(paths), _HASHING, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(_digest_or_none, paths))
    found = zip(paths, digests, strict=True)
    return {path: sha256 for path, sha256 in found if sha256 is not None}


def _digest_or_none(path: Path) -> str | None:
    try:
        return file_digest(path)
    except (FileNotFoundError, IsADirectoryError):
        return None
