"""The device that a recipe names, and the threads and the memory of the CPU."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpq_core.errors import InputError
from dpq_core.machine.device_kinds import index_of, kind_of


class DeviceError(InputError):
    """A device that this machine does not have, or whose memory is too small."""


def device_named(name: str) -> str:
    """A device that is here: `auto` is the kind of accelerator that there is, else the CPU.

    Raises:
        DeviceError: not a device's name, or not present here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator.type if accelerator else "cpu"
    number = name.partition(":")[2] or "0"
    if not number.isdecimal() or int(number) >= kind_of(name).count():
        raise DeviceError(
            f"execution.device: {name} is not available on this machine: choose auto or cpu"
        )
    return name


def resolve_device(name: str) -> torch.device:
    """The device of a name as torch knows it; of `auto` and of a kind, the first.

    Raises:
        DeviceError: not a device's name, or not present here.
    """
    found = device_named(name)
    kind = kind_of(found).torch_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, index_of(found))


def share_machine(threads: int) -> None:
    """Settle this process for work beside others: torch's threads, and memory given back.

    glibc keeps blocks up to 32 MiB for reuse, in every thread's arena, which adds up to more than
    the work needs. Blocks of a megabyte and more now go back to the kernel when they are freed.
    Elsewhere than on glibc this is only about threads.
    """
    settle_thread(threads)
    _keep_freed_blocks(below=1 << 20)


def settle_thread(threads: int) -> None:
    """Torch's threads, of this thread and of those to come. Asked first: a thread's first operation
    takes the process's number otherwise, whatever it was set to."""
    torch.get_num_threads()
    torch.set_num_threads(threads)


_changing = threading.Lock()
_wide: list[int] = []  # who is on the whole machine now: torch's threads before the first of them
_keeping: list[None] = []  # who keeps freed memory now


@contextmanager
def whole_machine(parts: int = 1) -> Iterator[None]:
    """All cores for torch (or one of `parts` equal shares), and freed memory kept: for stages that
    run alone and are bound by time.

    Torch's temporaries are large blocks. Mapped anew and faulted in page by page at every
    operation, they cost more than the arithmetic on them (`docs/log.md`). At the end all are given
    back, and the process shares the machine again. Several threads may be inside: what the first
    has found is what each leaves behind.
    """
    with _changing:
        before = _wide[0] if _wide else torch.get_num_threads()
        _wide.append(before)
    settle_thread(max(1, len(os.sched_getaffinity(0)) // parts))
    try:
        with freed_memory_kept():
            yield
    finally:
        with _changing:
            _wide.pop()
            settle_thread(before)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Freed memory kept for reuse, and given back when the last thread is at the end, as
    `share_machine` has it."""
    with _changing:
        _keeping.append(None)
        if len(_keeping) == 1:
            _keep_freed_blocks(below=1 << 30)
    try:
        yield
    finally:
        with _changing:
            _keeping.pop()
            if not _keeping:
                _keep_freed_blocks(below=1 << 20)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device's memory, or this machine's, does not suffice."""
    from accelerate.utils.memory import should_reduce_batch_size  # seconds

    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def give_back_memory() -> None:
    """What was freed, to the kernel, so that the process's resident memory is what it uses."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _keep_freed_blocks(below: int) -> None:
    """Set glibc's limits (bytes), and give back what is free above them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, below)
        libc.mallopt(_M_TRIM_THRESHOLD, below)
    give_back_memory()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
