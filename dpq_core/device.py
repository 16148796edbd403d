"""The device that a recipe names, and the threads of the CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceError(ValueError):
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
