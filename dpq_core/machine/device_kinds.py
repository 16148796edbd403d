"""Kinds of devices: how many a process sees, the class of their arithmetic, their memory.

A row for each kind; another kind that torch knows (xpu, mps) is asked through torch.

The *class of arithmetic* names what two devices must have in common to give the same bytes: the
instructions of a CPU, the architecture of a GPU. It stands in every cache key whose content a
device computes, so that machines of one class find each other's work and others do not.

`fake` is the CPU under several names, `fake:0` …, as many as the environment variable
`DPQ_FAKE_DEVICES` says: for rehearsing on a machine without GPUs what eight of them will do.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dpq_core.kernels import products

FAKE_DEVICES = "DPQ_FAKE_DEVICES"


def _nothing(index: int) -> int | None:
    return None


@dataclass(frozen=True)
class DeviceKind:
    """One row.

    torch_type: of tensors there. count: devices that this process sees. arithmetic: class of a
    device's, by its index. title: what it is called; None: as its kind. memory: bytes that this
    process can have of it; None where that is the machine's. peak: the most bytes that its tensors
    have taken since `forget_peak`. visible: the environment variable that says which devices a
    process sees, read when torch first uses one.
    """

    torch_type: str
    count: Callable[[], int]
    arithmetic: Callable[[int], str]
    title: Callable[[int], str] | None = None
    memory: Callable[[int], int | None] = _nothing
    peak: Callable[[int], int | None] = _nothing
    forget_peak: Callable[[int], None] = lambda index: None
    visible: str | None = None


def kind_of(name: str) -> DeviceKind:
    """The row of a device's name, `cuda` or `cuda:1`."""
    kind = name.partition(":")[0]
    return KINDS.get(kind) or _known_to_torch(kind)


def devices_of_kind(kind: str) -> list[str]:
    """Names of all devices of a kind that this process sees."""
    return [f"{kind}:{index}" for index in range(kind_of(kind).count())]


def index_of(name: str) -> int:
    """Number of the device that a name stands for; without one, the first."""
    return int(name.partition(":")[2] or 0)


def _cpu_arithmetic(_index: int) -> str:
    """What torch uses of its vector instructions, the units for products of few bits, each of which
    adds in an order of its own, and what the libraries are told to leave out."""
    used = torch.backends.cpu.get_cpu_capability().lower()
    units = [name for name in products.features() if name in _UNITS]
    multiplied = "bf16" if products.bf16_units() else "fp32"
    multiplied += "_panels" if products.in_panels() else ""
    told = [f"{name}={value}".lower() for name, value in products.limits().items()]
    return "-".join(["cpu", used, *units, multiplied, *told])


_UNITS = ("avx512_vnni", "avx512_bf16", "amx_bf16", "bf16")


def _cuda_arithmetic(index: int) -> str:
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return f"hip-{properties.gcnArchName.partition(':')[0]}"
    return f"cuda-sm_{properties.major}{properties.minor}"


def _known_to_torch(kind: str) -> DeviceKind:
    module: Any = getattr(torch, kind, None)

    def count() -> int:
        return int(module.device_count()) if hasattr(module, "device_count") else 0

    def arithmetic(index: int) -> str:
        name = getattr(module, "get_device_name", lambda _: "")(index)
        return "-".join([kind, *str(name).lower().split()])

    return DeviceKind(kind, count, arithmetic)


KINDS = {
    "cpu": DeviceKind("cpu", lambda: 1, _cpu_arithmetic),
    "cuda": DeviceKind(
        "cuda",
        torch.cuda.device_count,
        _cuda_arithmetic,
        torch.cuda.get_device_name,
        lambda index: torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index),
        torch.cuda.max_memory_allocated,
        torch.cuda.reset_peak_memory_stats,
        "CUDA_VISIBLE_DEVICES",
    ),
    "fake": DeviceKind("cpu", lambda: int(os.environ.get(FAKE_DEVICES, "0")), _cpu_arithmetic),
}
