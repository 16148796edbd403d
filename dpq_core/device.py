"""The device that a recipe names, and the threads and the memory of the CPU."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpq_core.errors import InputError


class DeviceError(InputError):
    """A device that this machine does not have."""


def resolve_device(name: str) -> torch.device:
    """`auto` is the first accelerator there is, else the CPU.

    Raises:
        DeviceError: not a device's name, or not present here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(
            f"execution.device: {name} is not available on this machine: choose auto or cpu"
        ) from error
    return device


@contextmanager
def whole_machine() -> Iterator[None]:
    """All cores for torch, and freed memory kept: for stages that run alone and are bound by time.

    Torch's temporaries are large blocks, which glibc maps anew and the kernel faults in page by
    page at every operation: that costs more than the arithmetic on them (`docs/log.md`). Inside,
    blocks up to a gigabyte stay with the process; at the end all are given back. Elsewhere than on
    glibc this is only about cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    libc = ctypes.CDLL(None)
    glibc = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if glibc:
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if glibc:
            libc.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_THRESHOLD)
            libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_THRESHOLD)
            libc.malloc_trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _DEFAULT_THRESHOLD = -1, -3, 128 << 10  # malloc.h
