"""Artifacts by the digest of what they were computed from.

    <root>/<stage>/<key>/.artifact.json    SHA-256 and size of every other file in the folder
    <root>/tmp/<pid>-<random>/             being written

An artifact is a folder. It is written under a temporary name, its manifest last, and renamed into
place in one step: what has no manifest under its own name does not exist. The key is the digest of
everything that the content depends on, so an artifact is never changed, only found or made.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

import psutil

_MANIFEST = ".artifact.json"
_FORMAT_VERSION = 1


class StoreError(RuntimeError):
    """An artifact that is not what its reference says."""


@dataclass(frozen=True)
class ArtifactRef:
    """Name of an artifact: all that travels between tasks.

    uri: `file://` of the folder. sha256: of its manifest, hence of its content. size: bytes.
    """

    uri: str
    sha256: str
    size: int

    @property
    def folder(self) -> Path:
        return Path(unquote(urlparse(self.uri).path))


class Store:
    """A folder of artifacts, shared by any number of processes."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """The artifact of a key, or None. One whose files do not have the sizes of its manifest
        is removed: it will be made again."""
        folder = self.root / stage / key
        if not (folder / _MANIFEST).is_file():
            return None
        try:
            files = _read_manifest(folder)
        except json.JSONDecodeError:
            self._discard(folder)
            return None
        if any(_size(folder / name) != entry["size"] for name, entry in files.items()):
            self._discard(folder)
            return None
        return _reference(folder, files)

    @contextmanager
    def writing(self, stage: str, key: str) -> Iterator[Path]:
        """An empty folder to fill; it becomes the key's artifact when the block ends without error.

        If another process finished the same key meanwhile, its artifact stays and ours is dropped:
        both have the same content.
        """
        temporary = self.root / "tmp" / f"{os.getpid()}-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _write_manifest(temporary)
            destination = self.root / stage / key
            destination.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.rename(destination)
            except OSError:
                if self.find(stage, key) is None:
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def get_or_make(
        self, stage: str, key: str, make: Callable[[Path], None]
    ) -> tuple[ArtifactRef, bool]:
        """The artifact of a key, made by filling a folder if there is none yet, and whether it
        was made now."""
        found = self.find(stage, key)
        if found is not None:
            return found, False
        with self.writing(stage, key) as folder:
            make(folder)
        made = self.find(stage, key)
        if made is None:
            raise StoreError(f"{self.root / stage / key}: vanished while it was written")
        return made, True

    def open(self, artifact: ArtifactRef) -> Path:
        """The artifact's folder, every byte of it checked against the reference.

        Raises:
            StoreError: missing, or changed since it was written.
        """
        folder = artifact.folder
        remedy = f"remove {folder} and run again: it will be made anew"
        if not (folder / _MANIFEST).is_file():
            raise StoreError(f"{folder}: artifact is missing; run again: it will be made anew")
        files = _read_manifest(folder)
        if _reference(folder, files).sha256 != artifact.sha256:
            raise StoreError(f"{folder}: manifest differs from the reference; {remedy}")
        for name, entry in files.items():
            path = folder / name
            if _size(path) != entry["size"] or _file_digest(path) != entry["sha256"]:
                raise StoreError(f"{path}: content differs from the manifest; {remedy}")
        return folder

    def remove(self, artifact: ArtifactRef) -> None:
        """Delete an artifact that nothing will read again. Missing is fine."""
        self._discard(artifact.folder)

    def clean(self) -> None:
        """Delete what processes that are gone left half-written."""
        for folder in (self.root / "tmp").glob("*-*"):
            if not psutil.pid_exists(int(folder.name.partition("-")[0])):
                shutil.rmtree(folder, ignore_errors=True)

    def _discard(self, folder: Path) -> None:
        (folder / _MANIFEST).unlink(missing_ok=True)  # first: from here on it does not exist
        shutil.rmtree(folder, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {
        str(path.relative_to(folder)): {"sha256": _file_digest(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format_version": _FORMAT_VERSION, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _read_manifest(folder: Path) -> dict[str, dict[str, str | int]]:
    manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
    if manifest.get("format_version") != _FORMAT_VERSION:
        raise StoreError(
            f"{folder / _MANIFEST}: format version {manifest.get('format_version')} is unknown: "
            f"this release reads {_FORMAT_VERSION}; use another execution.store"
        )
    files: dict[str, dict[str, str | int]] = manifest["files"]
    return files


def _reference(folder: Path, files: dict[str, dict[str, str | int]]) -> ArtifactRef:
    total = sum(int(entry["size"]) for entry in files.values())
    return ArtifactRef(folder.as_uri(), _file_digest(folder / _MANIFEST), total)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
