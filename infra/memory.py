"""Memory that is there, and memory that was used."""

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_EVERY = 0.05  # s
_CGROUPS = ("memory.max", "memory/memory.limit_in_bytes")  # version 2, version 1


@dataclass
class Peaks:
    """Most resident memory, bytes: of this process, and of any one worker process of it. start:
    this process's before."""

    start: int
    process: int
    worker: int = 0


@contextmanager
def watched() -> Iterator[Peaks]:
    """The peaks of what runs inside, complete when it ends."""
    this = psutil.Process()
    start = this.memory_info().rss
    peaks, ended = Peaks(start, start), threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY):
            peaks.process = max(peaks.process, this.memory_info().rss)
            for child in multiprocessing.active_children():
                peaks.worker = max(peaks.worker, _resident(child.pid))

    watcher = threading.Thread(target=watch, name="memory", daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()


def _resident(pid: int | None) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else 0
    except psutil.Error:
        return 0


def available_memory() -> int:
    """Bytes that processes can still take: of the machine, or of this container where it has less
    (an estimate: what others in it use now is not known)."""
    free = int(psutil.virtual_memory().available)
    for name in _CGROUPS:
        try:
            limit = int((Path("/sys/fs/cgroup") / name).read_text())
        except (OSError, ValueError):  # none, or "max"
            continue
        return min(free, limit)
    return free
