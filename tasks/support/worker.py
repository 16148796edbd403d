"""A worker, a thread or a process that runs tasks one after the other, has a device of its own.

Whoever starts workers claims devices (`infra/store/claims.py`: a device belongs to one run at a
time; a CPU is everybody's) and makes each worker the owner of one before its first task. Tasks ask
`this_worker` where to compute, and name its class of arithmetic in their keys.

A process of its own sees its device alone, so that whatever a library starts on "the GPU" is on
that one. A thread shares its process's view, and has its device as torch's current one.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from dpq_core.machine.device import DeviceError, device_named
from dpq_core.machine.device_kinds import devices_of_kind, index_of, kind_of
from dpq_core.recipe import ExecutionSection, Recipe
from dpq_core.serving.runtimes import RuntimeUnavailableError, runtime_for
from infra.store.claims import Claim, claims

_ON_CPU = 2  # workers where a recipe names no number


@dataclass(frozen=True)
class Worker:
    """name: of its device, as a recipe says it; title: what that is. device: where its tensors go.
    arithmetic: class of its device's. memory: bytes that it can have there; None where that is the
    machine's."""

    name: str
    title: str
    device: torch.device
    arithmetic: str
    memory: int | None

    @contextmanager
    def watched(self) -> Iterator[Callable[[], int | None]]:
        """A function that gives the most bytes of the device that were in use since the start of
        this; None where nobody keeps account."""
        kind, index = kind_of(self.name), self.device.index or 0
        kind.forget_peak(index)
        yield lambda: kind.peak(index)


_of_thread = threading.local()
_of_process: Worker | None = None
_own: "tuple[object, OwnDevices] | None" = None  # of a process that claims for itself: asked, got


class OwnDevices:
    """The devices of a run's workers on this machine, one each, kept from others until `release`.

    Raises:
        DeviceError: one is not here or another run's, or they differ in arithmetic.
    """

    def __init__(self, execution: ExecutionSection, workers: int | None = None) -> None:
        (found, least), most = _candidates(execution), workers or workers_here(execution)
        self.claims: list[Claim] = []
        if found == ["cpu"]:
            self.names = ["cpu"] * most
            return
        physical = {_physical(name): name for name in found}
        self.claims = list(islice(claims(physical), most))
        self.names = [physical[claim.name] for claim in self.claims]
        try:
            self._check(found, min(most, least))
        except DeviceError:
            self.release()
            raise

    def _check(self, found: list[str], least: int) -> None:
        if len(self.names) < least:
            raise DeviceError(
                f"execution.devices: of {', '.join(found)} other runs on this machine have all but"
                f" {len(self.names)}: wait for them to end, or ask for fewer"
            )
        if len(self.names) > 1:  # asking starts torch there: not before a process has but its own
            one_arithmetic({name: kind_of(name).arithmetic(index_of(name)) for name in self.names})

    def release(self) -> None:
        """Let other runs have them."""
        for claim in self.claims:
            claim.release()


def become_worker(name: str, of_process: bool) -> Worker:
    """Make a device that is ours that of this thread, or of this whole process.

    Torch starts on it here: Prefect gives its processes the flow's environment at every task, and
    what that says of visible devices would count otherwise.
    """
    global _of_process
    kind, index = kind_of(name), index_of(name)
    if kind.torch_type != "cpu":
        module = torch.get_device_module(kind.torch_type)
        if of_process and kind.visible and not module.is_initialized():
            os.environ[kind.visible] = _seen(name)
            index = 0  # the only one that is left
        else:
            module.set_device(index)
    worker = _worker(name, index)
    if of_process:
        _of_process = worker
    else:
        _of_thread.worker = worker
    return worker


def become_sole_worker(execution: ExecutionSection) -> Worker:
    """Claim a device of this machine that nobody has, for this whole process: until it ends, or
    until it is to have another.

    Raises:
        DeviceError: none is free.
    """
    global _own
    asked = (execution.device, execution.devices)
    if _own and _of_process and _own[0] == asked:
        return _of_process
    if _own:
        _own[1].release()
    _own = None
    devices = OwnDevices(execution, workers=1)
    worker = become_worker(devices.names[0], of_process=True)
    _own = asked, devices
    return worker


def of_a_worker() -> tuple[type[ThreadPoolTaskRunner[Any]], tuple[int]]:
    """What a worker has of the runner that started it, as `__reduce__` says it: at every task
    Prefect enters a copy of the flow's runner there, which must neither claim devices nor start
    anything."""
    return ThreadPoolTaskRunner, (1,)


def visible_devices(execution: ExecutionSection) -> list[str]:
    """The devices that a recipe names here, as the environment of a process names them.

    Raises:
        DeviceError: they are not here.
    """
    return [_seen(name) for name in _candidates(execution)[0][: workers_here(execution)]]


def device_kind(execution: ExecutionSection) -> str:
    """`cpu`, `cuda`: of the devices that a recipe names here.

    Raises:
        DeviceError: they are not here.
    """
    return _candidates(execution)[0][0].partition(":")[0]


def this_worker(execution: ExecutionSection) -> Worker:
    """The worker that runs this; where nobody made it one, on the device that the recipe names.

    Raises:
        DeviceError: no such device here.
    """
    found: Worker | None = getattr(_of_thread, "worker", None) or _of_process
    if found:
        if found.device.type != "cpu":  # of this thread, in which a kernel's launch looks for it
            torch.get_device_module(found.device).set_device(found.device)
        return found
    first = _candidates(execution)[0][0]
    return _worker(first, index_of(first))


@task(name="worker", cache_policy=NO_CACHE)
def about_worker(recipe: Recipe) -> Worker:
    """What a run's workers are, asked of one; all have the same class of arithmetic.

    Raises:
        DeviceError: they lack the device that the recipe names. RuntimeUnavailableError: what is
            to be scored as it is served, they have nothing to serve with.
    """
    worker = this_worker(recipe.execution)
    if recipe.evaluation.served:
        try:
            runtime_for(worker.device)
        except RuntimeUnavailableError as error:
            raise RuntimeUnavailableError(
                f"evaluation.arithmetic is served, and {error}: set it to definition"
            ) from error
    return worker


def one_arithmetic(classes: dict[str, str]) -> None:
    """Workers whose bytes differ are not mixed. classes: arithmetic, by device or worker.

    Raises:
        DeviceError: naming two that differ.
    """
    first, *others = classes.items()
    for name, arithmetic in others:
        if arithmetic != first[1]:
            raise DeviceError(
                f"execution.devices: {first[0]} computes as {first[1]} and {name} as {arithmetic}:"
                " their bytes would differ: name devices of one kind"
            )


def workers_here(execution: ExecutionSection) -> int:
    """Workers of this machine that a recipe asks for, at the most.

    Raises:
        DeviceError: as `OwnDevices`.
    """
    found, _ = _candidates(execution)
    if found == ["cpu"]:
        return execution.workers or _ON_CPU
    most = execution.devices if isinstance(execution.devices, int) else len(found)
    return min(most, execution.workers or most)


def _candidates(execution: ExecutionSection) -> tuple[list[str], int]:
    """Devices of this machine that workers may take, and how many a recipe insists on."""
    asked = execution.devices
    if isinstance(asked, list):
        return [device_named(name) for name in asked], len(asked)
    name = device_named(execution.device)
    found = [name] if ":" in name or name == "cpu" else devices_of_kind(name)
    if asked == "auto":
        return found, 1
    if name == "cpu" or asked > len(found):
        raise DeviceError(
            f"execution.devices: {asked}, and of {name} this machine has {len(found)}: lower it, or"
            " leave it out for all that there are (of a CPU, execution.workers says how many tasks"
            " it runs at a time)"
        )
    return found, asked


def _worker(name: str, index: int) -> Worker:
    """index: as this process numbers devices now."""
    kind = kind_of(name)
    on_cpu = kind.torch_type == "cpu"
    device = torch.device("cpu") if on_cpu else torch.device(kind.torch_type, index)
    title = kind.title(index) if kind.title else name.partition(":")[0]
    return Worker(name, title, device, kind.arithmetic(index), kind.memory(index))


def _physical(name: str) -> str:
    """A device's name whatever this process sees of the machine."""
    return f"{name.partition(':')[0]}-{_seen(name)}"


def _seen(name: str) -> str:
    """What a device is called in the variable that says which devices a process sees."""
    visible, index = kind_of(name).visible, index_of(name)
    seen = os.environ.get(visible, "") if visible else ""
    return seen.split(",")[index] if seen else str(index)
