"""Memory that a model has, that a device has left, and that work takes at its peak, in bytes."""

import gc
import threading
from types import TracebackType
from typing import Self

import psutil
import torch
from torch import nn

from dpq_core.machine.device import give_back_memory

_EVERY = 0.002  # s, between two looks at a process


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def free_bytes(device: torch.device) -> int:
    """Free bytes of an accelerator, or of this machine."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    free: int = torch.get_device_module(device).mem_get_info(device)[0]
    return free


def free_unused(device: torch.device) -> None:
    """What nothing refers to any more, to the device or to the kernel."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    give_back_memory()


class Peak:
    """What the block takes at its peak beyond what is taken at its beginning: of the allocator of
    an accelerator; on a CPU of the process's resident memory, looked at every 2 ms."""

    bytes = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._start = 0

    def __enter__(self) -> Self:
        free_unused(self._device)
        if self._device.type == "cpu":
            self._start = self._process.memory_info().rss
            self._watcher.start()
        else:
            allocator = torch.get_device_module(self._device)
            allocator.synchronize()
            allocator.reset_peak_memory_stats()
            self._start = allocator.memory_allocated()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._device.type == "cpu":
            self._ended.set()
            self._watcher.join()
        else:
            allocator = torch.get_device_module(self._device)
            allocator.synchronize()
            self.bytes = max(0, allocator.max_memory_allocated() - self._start)

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._start)
