"""Leases: one process at a time makes an artifact, and the work of a dead one is taken over.

    <folder>/<name>/<owner>      at most one file: who holds the lease; mtime: its last sign of life

A lease changes hands by renames alone, which a local file system and NFS do one after the other:

- it is taken by renaming a folder that already holds our file to the lease's name, which fails
  where the lease has a holder;
- it is taken over by renaming the dead holder's file, by its own name, to ours: of two that try,
  one no longer finds it;
- it is let go by removing our file. An empty folder is as good as none.

A holder of the same machine is dead when its process is gone, which shows at once; a stopped or
busy one lives. A holder of another machine is dead when it gave no sign of life for as long as
`LIMIT` while we watched: no two clocks are compared. A process that only seemed dead loses its
lease without knowing; then two make the same, and the store keeps one.

Nobody waits in a circle. Who holds the lease of a key waits at most for keys that its own content
depends on. A key is the digest of all that its content depends on, so the keys form a DAG, and
every wait goes down in it, whichever process or thread holds what. (Asking for a key while making
that same key would be a recursion without end; it has nothing to do with leases.)
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from infra.store.owners import LIMIT, Owner, signs_of_life

_POLL = (0.02, 0.5)  # s, first and longest, between two looks at a lease that is held
_SILENT = 2.0  # s of waiting that nobody is told of
_NEW = ".new-"

_on_wait: ContextVar[Callable[[str], None] | None] = ContextVar("on_wait", default=None)


@contextmanager
def telling_of_waits(tell: Callable[[str], None]) -> Iterator[None]:
    """Call `tell` with a line when something that runs inside waits for another process."""
    token = _on_wait.set(tell)
    try:
        yield
    finally:
        _on_wait.reset(token)


class Leases:
    """The leases of a folder, shared by any number of processes, threads and machines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Hold a lease while the block runs, once nobody else does."""
        lease, mine = self.folder / name, Owner.new()
        self._acquire(lease, mine)
        try:
            with signs_of_life(lease / str(mine)):
                yield
        finally:
            (lease / str(mine)).unlink(missing_ok=True)
            _remove_empty(lease)

    def holder(self, name: str) -> Owner | None:
        """Who has a lease, dead or alive."""
        holding = _holding(self.folder / name)
        return Owner.parse(holding.name) if holding else None

    def clean(self) -> None:
        """Remove what processes of this machine left that are gone."""
        for path in self.folder.glob("*"):
            owner = Owner.parse(path.name.removeprefix(_NEW)) or self.holder(path.name)
            if path.name.startswith(_NEW) and owner and owner.gone:
                shutil.rmtree(path, ignore_errors=True)
            elif owner and owner.gone:
                (path / str(owner)).unlink(missing_ok=True)
                _remove_empty(path)

    def _acquire(self, lease: Path, mine: Owner) -> None:
        began, told, poll = time.monotonic(), False, _POLL[0]
        seen: tuple[Path, int] | None = None
        since = began
        while True:
            holding = _holding(lease)
            if holding is None:
                if self._create(lease, mine):
                    return
                continue
            owner, sign = Owner.parse(holding.name), (holding, _mtime(holding))
            if sign != seen:
                seen, since = sign, time.monotonic()
            dead = owner.gone if owner else None
            if dead is None:
                dead = time.monotonic() - since > LIMIT
            if dead and _take_over(holding, lease / str(mine)):
                return
            if (tell := _on_wait.get()) and not told and time.monotonic() - began > _SILENT:
                told = True
                tell(f"waiting for {lease.name}: {owner.shown if owner else 'somebody'} makes it")
            time.sleep(poll)
            poll = min(1.5 * poll, _POLL[1])

    def _create(self, lease: Path, mine: Owner) -> bool:
        """Take a lease that has no holder; False where somebody was faster."""
        new = self.folder / f"{_NEW}{mine}"
        new.mkdir(parents=True)
        try:
            (new / str(mine)).touch()
            new.rename(lease)
            return True
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _holding(lease: Path) -> Path | None:
    try:
        return next(lease.iterdir(), None)
    except FileNotFoundError:
        return None


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _take_over(dead: Path, mine: Path) -> bool:
    try:
        dead.rename(mine)
    except FileNotFoundError:
        return False
    os.utime(mine)
    return True


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # somebody holds it already
        folder.rmdir()
