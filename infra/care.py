"""What lies in a store, what is wrong with it, and what nobody needs any more.

An artifact is kept when a registered version refers to it (its key or its SHA-256 stands in the
version's source or tags), when it was made or found since the oldest run began that is at work now,
or when it was within the last days. Everything else can be computed again.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infra.errors import one_line
from infra.registry import Registry
from infra.store import COLLECTOR, Store
from infra.store.marker import mark
from infra.store.owners import now

DAY = 86400.0
_DIGEST = re.compile(r"[0-9a-f]{64}")  # a key, or an artifact's SHA-256


class StoreCareError(RuntimeError):
    """A store that cannot be judged, with the way out."""


@dataclass(frozen=True)
class Stored:
    """An artifact as it lies in the store. size: bytes of its files. idle: seconds unused."""

    folder: Path
    stage: str
    size: int
    idle: float


@dataclass(frozen=True)
class Collected:
    """What was deleted, or would be, and what is kept although nobody has used it for long."""

    deleted: list[Stored]
    registered: list[Stored]
    runs: list[str]  # that are at work


def stored(store: Store) -> Iterator[Stored]:
    """All artifacts, stage by stage; those that a run removes meanwhile are left out.

    Raises:
        StoreCareError: no such folder. StoreError: one that is no store.
    """
    if not store.root.is_dir():
        raise StoreCareError(f"{store.root}: no such store; name it with --store")
    mark(store.root)
    time = now(store.root / "tmp")
    for folder in store.folders():
        with suppress(FileNotFoundError):
            sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
            idle = time - store.last_used(folder) / 1e9
            yield Stored(folder, folder.parent.name, sum(sizes), max(idle, 0.0))


def problems(store: Store, artifact: Stored) -> list[str]:
    """What is wrong with an artifact, a line each; nothing where a run has removed it meanwhile."""
    wrong = store.problems(artifact.folder)
    return wrong if artifact.folder.exists() else []


def collect(store: Store, registries: Iterable[str], keep: float, dry_run: bool) -> Collected:
    """Delete what nobody needs; `dry_run` only says what that is.

    Args:
        registries: tracking URIs besides those that the store remembers.
        keep: seconds after its last use for which an artifact stays in any case.

    Raises:
        StoreCareError: a registry that cannot be asked.
    """
    everything = list(stored(store))
    if dry_run:
        return _sorted_out(store, everything, registries, keep, lambda artifact: None)
    aside: list[Path] = []

    def delete(artifact: Stored) -> None:
        with suppress(FileNotFoundError):  # its run has removed it
            aside.append(store.set_aside(artifact.folder))

    with store.lease(COLLECTOR):
        result = _sorted_out(store, everything, registries, keep, delete)
    for folder in aside:
        shutil.rmtree(folder, ignore_errors=True)
    store.clean()
    return result


def _sorted_out(
    store: Store,
    everything: list[Stored],
    registries: Iterable[str],
    keep: float,
    delete: Callable[[Stored], None],
) -> Collected:
    living = store.runs.living()
    since = min(living.values(), default=None)
    named = _registered(store, registries)  # after: who has left has registered before
    time = now(store.root / "tmp")
    deleted, registered = [], []
    for artifact in everything:
        try:
            used = store.last_used(artifact.folder)
            wanted = named & {artifact.folder.name, store.digest(artifact.folder)}
        except FileNotFoundError:  # its run had no more use for it
            continue
        if time - used / 1e9 < keep or (since is not None and used >= since):
            continue
        if wanted:
            registered.append(artifact)
        else:
            delete(artifact)
            deleted.append(artifact)
    return Collected(deleted, registered, [owner.shown for owner in living])


def _registered(store: Store, registries: Iterable[str]) -> set[str]:
    """All digests that versions of the registries speak of."""
    remembered = {uri: path for path, uri in store.registries().items()}
    found: set[str] = set()
    for uri in {*registries, *remembered}:
        try:
            _check_database(uri)
            for text in Registry(uri).references():
                found |= set(_DIGEST.findall(text))
        except Exception as error:  # of MLflow, SQLAlchemy, requests
            way_out = (
                f"; if it is gone for good, remove {remembered[uri]}" if uri in remembered else ""
            )
            raise StoreCareError(
                f"registry {uri} cannot be asked which artifacts it needs, so nothing was deleted"
                f"{way_out}: {one_line(error, 200)}"
            ) from error
    return found


def _check_database(uri: str) -> None:
    """MLflow would make a database that is missing, and say that nothing is registered."""
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
