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
def all_cores() -> Iterator[None]:
    """All cores for torch's products inside: for stages that run alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let glibc keep blocks up to a gigabyte instead of giving them back to the kernel.

    Torch's temporaries are such blocks: mapped anew and faulted in page by page at every operation,
    they cost more than the arithmetic on them (`docs/log.md`). Elsewhere than on glibc: nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
