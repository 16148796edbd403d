"""Artifacts by the digest of what they were computed from.

    <root>/.dpq-store                      that it is a store: infra/store/marker.py
    <root>/<stage>/<key>/.artifact.json    SHA-256 and size of every other file in the folder
    <root>/<stage>/<key>/.used             empty; mtime: when it was last made or found
    <root>/tmp/<owner>/                    being written, or being deleted
    <root>/leases/, <root>/runs/           who makes what, and who is at work: infra/store/leases.py
    <root>/registries/                     addresses of the registries that name artifacts of ours

An artifact is a folder. It is written under a temporary name, its manifest last, and renamed into
place in one step: what has no manifest under its own name does not exist. The key is the digest of
everything that the content depends on, so an artifact is never changed, only found or made; and it
is made by one process at a time, while the others wait for it.

It is deleted in the reverse order: renamed to `tmp` in one step, then removed at leisure, so that a
process that dies on the way leaves waste there, and no half of an artifact under its name. Whoever
reads meanwhile finds all of it or none. Only names of our own form are deleted, ever.

Deleting (`infra/care.py`) and finding agree by who writes first: the collector takes the
lease `gc` and then looks when an artifact was last used; whoever finds one says first that it is
used, then waits for as long as somebody has that lease, and only then looks whether it is there.
"""

import errno
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from infra.store.disk import is_full, space_left
from infra.store.leases import Leases
from infra.store.manifest import MANIFEST, USED, Manifest, file_digest
from infra.store.marker import OURS, is_store, mark
from infra.store.marker import StoreError as StoreError
from infra.store.owners import Attendance, Owner

COLLECTOR = "gc"  # name of its lease
_FORSAKEN = 86400.0  # s without a change, after which another machine's temporary folder is waste
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


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
        self.root = Path(root).expanduser().resolve()
        self.runs = Attendance(self.root / "runs")
        self._leases = Leases(self.root / "leases")

    @contextmanager
    def in_use(self) -> Iterator[Owner]:
        """While it lasts, nothing that was found or made since its start is deleted as waste.

        Raises:
            StoreError: the folder is not empty, and no store.
            StoreFullError: no space left, not even to say so.
        """
        with ExitStack() as stack:
            with self._space_for("runs", "of mine"):
                mark(self.root)
                owner = stack.enter_context(self.runs.present())
            yield owner

    def lease(self, name: str) -> AbstractContextManager[None]:
        """Held by one process (and thread) at a time; the others wait, and say so."""
        mark(self.root)
        return self._leases.held(name)

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """The artifact of a key, or None. One whose files do not have the sizes of its manifest
        is removed: it will be made again."""
        folder = self.root / stage / key
        try:
            while (folder / MANIFEST).is_file():
                (folder / USED).touch()
                if self._leases.holder(COLLECTOR):
                    with self.lease(COLLECTOR):
                        pass
                looked_at = _identity(folder)
                if found := _whole(folder):
                    return found
                if _identity(folder) == looked_at:  # not removed, nor made anew, meanwhile
                    self._discard(folder)
                    return None
        except FileNotFoundError:  # removed just now
            pass
        return None

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
        try:
            while True:
                looked_at = _identity(folder)
                wrong = _wrong(folder, artifact)
                if wrong is None:
                    return folder
                if _identity(folder) == looked_at:  # not removed, nor made anew, meanwhile
                    break
        except (FileNotFoundError, NotADirectoryError) as error:
            message = f"{folder}: artifact is missing; run again: it will be made anew"
            raise StoreError(message) from error
        raise StoreError(f"{wrong}; remove {folder} and run again: it will be made anew")

    def remove(self, artifact: ArtifactRef) -> None:
        """Delete an artifact that nothing will read again. Missing is fine.

        Raises:
            StoreError: it is not of this store.
        """
        self._discard(artifact.folder)

    def clean(self) -> None:
        """Delete what processes that are gone left half-written or half-deleted, by its name: what
        nobody of ours has made stays.

        Raises:
            StoreError: the folder is not empty, and no store.
        """
        mark(self.root)
        for folder in (self.root / "tmp").glob("*"):
            if (owner := Owner.parse(folder.name)) is None:
                continue
            gone = owner.gone
            if gone or (gone is None and _unchanged_for(folder) > _FORSAKEN):
                shutil.rmtree(folder, ignore_errors=True)
        self._leases.clean()
        self.runs.forget_the_dead()

    def folders(self) -> Iterator[Path]:
        """Folders of all artifacts, stage by stage."""
        for manifest in sorted(self.root.glob(f"*/*/{MANIFEST}")):
            if manifest.parent.parent.name not in OURS:
                yield manifest.parent

    def last_used(self, folder: Path) -> int:
        """When an artifact was last made or found: ns on the clock of the store's file system."""
        used = folder / USED
        return (used if used.exists() else folder).stat().st_mtime_ns

    def digest(self, folder: Path) -> str:
        """SHA-256 of an artifact, as its reference gives it."""
        return file_digest(folder / MANIFEST)

    def set_aside(self, folder: Path) -> Path:
        """An artifact moved to where nobody looks for it, to be deleted at leisure.

        Raises:
            FileNotFoundError: it is not there. StoreError: it is not of this store.
        """
        if folder.parent.parent != self.root or folder.parent.name in OURS:
            raise StoreError(f"{folder} is no artifact of {self.root}: it stays where it is")
        mark(self.root)
        aside = self.root / "tmp" / str(Owner.new())
        aside.parent.mkdir(parents=True, exist_ok=True)
        return folder.rename(aside)

    def problems(self, folder: Path) -> list[str]:
        """What is wrong with an artifact, a line each; every byte is read."""
        try:
            return Manifest.read(folder).problems(folder)
        except (OSError, ValueError, KeyError, StoreError) as error:
            return [f"{folder / MANIFEST}: unreadable: {error}"]

    def remember_registry(self, uri: str) -> None:
        """Note that a registry names artifacts of this store."""
        mark(self.root)
        path = self.root / "registries" / hashlib.sha256(uri.encode()).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uri, "utf-8")

    def registries(self) -> dict[Path, str]:
        """Addresses of the registries that name artifacts of ours, by the file that says so."""
        return {path: path.read_text("utf-8") for path in (self.root / "registries").glob("*")}

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        mark(self.root)
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
        made = Manifest.write(temporary)
        destination = self.root / stage / key
        destination.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                temporary.rename(destination)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                if found := self.find(stage, key):
                    return found
                if not (destination / MANIFEST).is_file():  # does not exist, see above
                    self._discard(destination)
            else:
                return ArtifactRef(destination.as_uri(), made.sha256, made.size)

    def _discard(self, folder: Path) -> None:
        with suppress(FileNotFoundError):  # somebody was faster
            shutil.rmtree(self.set_aside(folder), ignore_errors=True)


def artifact_at(folder: Path) -> "tuple[Store, ArtifactRef] | None":
    """The artifact that a folder is, and its store; None where it is none."""
    root = folder.parent.parent
    if folder.parent.name in OURS or not (folder / MANIFEST).is_file() or not is_store(root):
        return None
    found = _whole(folder)
    return None if found is None else (Store(root), found)


def artifact_around(path: Path) -> Path:
    """The artifact's folder that a path is in; the path itself where it is in none."""
    around = (path, *path.parents)
    return next((folder for folder in around if (folder / MANIFEST).is_file()), path)


def _whole(folder: Path) -> ArtifactRef | None:
    """An artifact whose files have the sizes of its manifest; None where that is not so."""
    try:
        manifest = Manifest.read(folder)
    except (ValueError, KeyError, TypeError):
        return None
    if not manifest.has_sizes_of(folder):
        return None
    return ArtifactRef(folder.as_uri(), manifest.sha256, manifest.size)


def _wrong(folder: Path, artifact: ArtifactRef) -> str | None:
    """How a folder differs from a reference; None: in no byte."""
    try:
        manifest = Manifest.read(folder)
    except ValueError as error:
        return f"{folder / MANIFEST}: unreadable: {error}"
    if manifest.sha256 != artifact.sha256:
        return f"{folder}: manifest differs from the reference"
    return next(iter(manifest.problems(folder)), None)


def _identity(folder: Path) -> tuple[int, int]:
    """The identity of the folder that has a name now. Inodes are used again; the time is of the
    last rename."""
    about = folder.stat()
    return about.st_ino, about.st_ctime_ns


def _unchanged_for(folder: Path) -> float:
    """Seconds since anything in a folder changed."""
    times = []
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return time.time() - max(times, default=0)
