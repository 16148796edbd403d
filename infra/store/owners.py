"""Processes by name, and whether they still live: on this machine by their pid, elsewhere by a file
that they touch every few seconds.

    <folder>/<owner>     content: mtime of this file at its start, ns; mtime: the last sign of life
"""

import hashlib
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import psutil

PROCESS = "dpq.process"  # tag or label of a run that says whose it is
LIMIT = 60.0  # s without a sign of life, after which others do the work of a process
_ABSENT = 600.0  # s, after which it is taken off the list: what it uses may be deleted then
_BEAT = 10.0  # s between signs of life
# Pid, start, place, tag, host. What has such a name may be deleted: nothing else looks like it.
_FORM = re.compile(r"(\d{1,10})\.(\d{1,12})\.([0-9a-f]{8})\.([0-9a-f]{16})\.(.+)", re.ASCII)


@dataclass(frozen=True)
class Owner:
    """A process, named so that others can tell whether it lives: a pid means something in one
    place alone, and there only together with the second in which it `started` (`_started`).

    tag: what else tells apart; a process may hold many things.
    """

    pid: int
    started: int
    place: str
    host: str
    tag: str = ""

    @classmethod
    def new(cls) -> Self:
        """This process, with a tag that nobody else has."""
        started = _started(psutil.Process())
        return cls(os.getpid(), started, _place(), socket.gethostname(), uuid.uuid4().hex[:16])

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Inverse of `str`; None for what is no such name."""
        form = _FORM.fullmatch(name)
        if form is None:
            return None
        pid, started, place, tag, host = form.groups()
        return cls(int(pid), int(started), place, host, tag)

    def __str__(self) -> str:
        return f"{self.pid}.{self.started}.{self.place}.{self.tag}.{self.host}"

    @property
    def shown(self) -> str:
        """For people."""
        return f"process {self.pid} on {self.host}"

    @property
    def gone(self) -> bool | None:
        """Whether it has ended; None where its pid means nothing to us."""
        if self.place != _place():
            return None
        try:
            process = psutil.Process(self.pid)
            another = abs(_started(process) - self.started) > 2  # a clock may be set by a little
            return bool(another or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


def _started(process: psutil.Process) -> int:
    """When a process started, s: on Linux since the machine's, which no clock that is set moves;
    elsewhere Unix time."""
    began = process.create_time()
    return int(began - psutil.boot_time() if psutil.LINUX else began)


@cache
def _place() -> str:
    """Where pids are ours: this boot of this machine, and this container of it."""
    boot, pids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    about = [
        socket.gethostname(),
        boot.read_text() if boot.exists() else "",
        str(pids.readlink()) if pids.is_symlink() else "",
    ]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:8]


@contextmanager
def signs_of_life(path: Path) -> Iterator[None]:
    """Touch a file every few seconds; if somebody took it away, it stays away."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Attendance:
    """Who is at work in a place that a folder stands for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def present(self) -> Iterator[Owner]:
        """Be on the list while the block runs, and leave it however the block ends."""
        owner = Owner.new()
        path = self.folder / str(owner)
        self.folder.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.write_text(str(path.stat().st_mtime_ns), "utf-8")
        try:
            with signs_of_life(path):
                yield owner
        finally:
            path.unlink(missing_ok=True)

    def living(self) -> dict[Owner, int]:
        """All who are at work, with the time on the folder's own clock (ns) at which they began."""
        found = {}
        for owner in self._listed():
            path = self.folder / str(owner)
            with suppress(FileNotFoundError):  # left just now
                if not self.dead(owner):
                    said = path.read_text("utf-8")
                    found[owner] = int(said) if said else path.stat().st_mtime_ns
        return found

    def dead(self, owner: Owner) -> bool:
        """Whether its process has ended. Of another machine we know that by what it left here."""
        if owner.gone is not None:
            return owner.gone
        theirs = self.folder.glob(f"{owner.pid}.{owner.started}.{owner.place}.*")
        seen = [path.stat().st_mtime for path in theirs]
        return bool(seen) and now(self.folder) - max(seen) > _ABSENT

    def forget_the_dead(self) -> None:
        """Take them off the list."""
        for owner in self._listed():
            if self.dead(owner):
                (self.folder / str(owner)).unlink(missing_ok=True)

    def _listed(self) -> list[Owner]:
        names = [path.name for path in self.folder.glob("*")]
        return [owner for name in names if (owner := Owner.parse(name))]


def now(folder: Path) -> float:
    """The time (s) on the clock that stamps the files of this folder: perhaps a server's."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".now-{Owner.new()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()
