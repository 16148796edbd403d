"""Artifacts by the digest of what they were computed from.

    <root>/<stage>/<key>/.artifact.json    SHA-256 and size of every other file in the folder
    <root>/<stage>/<key>/.used             empty; mtime: when it was last made or found
    <root>/tmp/<owner>/                    being written, or being deleted
    <root>/leases/, <root>/runs/           who makes what, and who is at work: infra/leases.py
    <root>/registries/                     addresses of the registries that name artifacts of ours

An artifact is a folder. It is written under a temporary name, its manifest last, and renamed into
place in one step: what has no manifest under its own name does not exist. The key is the digest of
everything that the content depends on, so an artifact is never changed, only found or made; and it
is made by one process at a time, while the others wait for it.

Deleting (`infra/store_care.py`) and finding agree by who writes first: the collector takes the
lease `gc` and then looks when an artifact was last used; whoever finds one says first that it is
used, then waits for as long as somebody has that lease, and only then looks whether it is there.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from infra.disk import is_full, space_left
from infra.leases import Leases
from infra.owners import Attendance, Owner

COLLECTOR = "gc"  # name of its lease
_MANIFEST = ".artifact.json"
_USED = ".used"
_FORMAT_VERSION = 1
_OURS = ("tmp", "leases", "runs", "registries")  # folders that are no stages
_FORSAKEN = 86400.0  # s without a change, after which another machine's temporary folder is waste


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


class StoreFullError(StoreError):
    """No space left for an artifact, with the folder and the way out."""


class Store:
    """A folder of artifacts, shared by any number of processes."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.runs = Attendance(self.root / "runs")
        self._leases = Leases(self.root / "leases")

    @contextmanager
    def in_use(self) -> Iterator[Owner]:
        """While it lasts, nothing that was found or made since its start is deleted as waste.

        Raises:
            StoreFullError: no space left, not even to say so.
        """
        with ExitStack() as stack:
            with self._space_for("runs", "of mine"):
                owner = stack.enter_context(self.runs.present())
            yield owner

    def lease(self, name: str) -> AbstractContextManager[None]:
        """Held by one process (and thread) at a time; the others wait, and say so."""
        return self._leases.held(name)

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """The artifact of a key, or None. One whose files do not have the sizes of its manifest
        is removed: it will be made again."""
        folder = self.root / stage / key
        try:
            if not (folder / _MANIFEST).is_file():
                return None
            (folder / _USED).touch()
            if self._leases.holder(COLLECTOR):
                with self.lease(COLLECTOR):
                    pass
            files = _read_manifest(folder)
        except FileNotFoundError:  # deleted just now
            return None
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

        Raises:
            StoreFullError: no space left.
        """
        with self._space_for(stage, key), self._temporary() as folder:
            yield folder
            self._publish(folder, stage, key)

    def get_or_make(
        self, stage: str, key: str, make: Callable[[Path], None]
    ) -> tuple[ArtifactRef, bool]:
        """The artifact of a key, made by filling a folder if there is none yet, and whether it
        was made now. Where another process is making it, that is waited for.

        Raises:
            StoreFullError: no space left.
        """
        if found := self.find(stage, key):
            return found, False
        with self._space_for(stage, key), self.lease(f"{stage}-{key}"):
            if found := self.find(stage, key):
                return found, False
            with self._temporary() as folder:
                make(folder)
                return self._publish(folder, stage, key), True

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
        paths = [folder / name for name in files]
        digests = _file_digests([path for path in paths if path.is_file()])
        for path, entry in zip(paths, files.values(), strict=True):
            if digests.get(path) != entry["sha256"] or _size(path) != entry["size"]:
                raise StoreError(f"{path}: content differs from the manifest; {remedy}")
        return folder

    def remove(self, artifact: ArtifactRef) -> None:
        """Delete an artifact that nothing will read again. Missing is fine."""
        self._discard(artifact.folder)

    def clean(self) -> None:
        """Delete what processes that are gone left half-written or half-deleted."""
        for folder in (self.root / "tmp").glob("*"):
            owner = Owner.parse(folder.name)
            gone = owner.gone if owner else None
            if gone or (gone is None and _unchanged_for(folder) > _FORSAKEN):
                shutil.rmtree(folder, ignore_errors=True)
        self._leases.clean()
        self.runs.forget_the_dead()

    def folders(self) -> Iterator[Path]:
        """Folders of all artifacts, stage by stage."""
        for manifest in sorted(self.root.glob(f"*/*/{_MANIFEST}")):
            if manifest.parent.parent.name not in _OURS:
                yield manifest.parent

    def last_used(self, folder: Path) -> int:
        """When an artifact was last made or found: ns on the clock of the store's file system."""
        used = folder / _USED
        return (used if used.exists() else folder).stat().st_mtime_ns

    def digest(self, folder: Path) -> str:
        """SHA-256 of an artifact, as its reference gives it."""
        return _file_digest(folder / _MANIFEST)

    def set_aside(self, folder: Path) -> Path:
        """An artifact moved to where nobody looks for it, to be deleted at leisure."""
        aside = self.root / "tmp" / str(Owner.new())
        aside.parent.mkdir(parents=True, exist_ok=True)
        return folder.rename(aside)

    def problems(self, folder: Path) -> list[str]:
        """What is wrong with an artifact, a line each; every byte is read."""
        try:
            files = _read_manifest(folder)
        except (OSError, ValueError, KeyError, StoreError) as error:
            return [f"{folder / _MANIFEST}: unreadable: {error}"]
        wrong = []
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                wrong.append(f"{path}: missing")
            elif _size(path) != entry["size"]:
                wrong.append(f"{path}: {_size(path)} bytes, {entry['size']} in the manifest")
            elif _file_digest(path) != entry["sha256"]:
                wrong.append(f"{path}: content differs from the manifest")
        return wrong

    def remember_registry(self, uri: str) -> None:
        """Note that a registry names artifacts of this store."""
        path = self.root / "registries" / hashlib.sha256(uri.encode()).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uri, "utf-8")

    def registries(self) -> dict[Path, str]:
        """Addresses of the registries that name artifacts of ours, by the file that says so."""
        return {path: path.read_text("utf-8") for path in (self.root / "registries").glob("*")}

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        folder = self.root / "tmp" / str(Owner.new())
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _space_for(self, stage: str, key: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # libraries have their own for a full disk
            if not is_full(error):
                raise
            raise StoreFullError(
                f"{self.root}: {space_left(self.root)}, too little for {stage}/{key[:12]}: make "
                "room (`dpq store gc --dry-run` says what can go) or use another execution.store; "
                "then run again: what is finished is kept"
            ) from error

    def _publish(self, temporary: Path, stage: str, key: str) -> ArtifactRef:
        """A filled folder under its own name."""
        files = _write_manifest(temporary)
        destination = self.root / stage / key
        made = _reference(temporary, files)
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(destination)
        except OSError:
            if found := self.find(stage, key):
                return found
            raise
        return ArtifactRef(destination.as_uri(), made.sha256, made.size)

    def _discard(self, folder: Path) -> None:
        (folder / _MANIFEST).unlink(missing_ok=True)  # first: from here on it does not exist
        shutil.rmtree(folder, ignore_errors=True)


def artifact_around(path: Path) -> Path:
    """The artifact's folder that a path is in; the path itself where it is in none."""
    around = (path, *path.parents)
    return next((folder for folder in around if (folder / _MANIFEST).is_file()), path)


def _write_manifest(folder: Path) -> dict[str, dict[str, str | int]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files: dict[str, dict[str, str | int]] = {
        str(path.relative_to(folder)): {"sha256": sha256, "size": path.stat().st_size}
        for path, sha256 in _file_digests(paths).items()
    }
    manifest = {"format_version": _FORMAT_VERSION, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    (folder / _USED).touch()
    return files


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


def _unchanged_for(folder: Path) -> float:
    """Seconds since anything in a folder changed."""
    times = []
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return time.time() - max(times, default=0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _file_digests(paths: list[Path]) -> dict[Path, str]:
    """Of several files; of large ones by several cores."""
    if len(paths) < 2 or sum(path.stat().st_size for path in paths) < _LARGE:
        return {path: _file_digest(path) for path in paths}
    with ThreadPoolExecutor(min(len(paths), _HASHING, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(_file_digest, paths), strict=True))


_LARGE, _HASHING = 64 << 20, 8  # bytes, cores


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
