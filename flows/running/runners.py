"""Where a flow's tasks run: threads or processes of this machine, which end when the flow does, or
a Dask cluster (`dask_runner`).

Prefect's runners wait for what is in work, an hour perhaps, when the flow is told to stop. Nothing
is lost by not waiting: an artifact that is not whole does not exist.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.queues import SimpleQueue
from typing import Any, Self, TypeVar

from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from dpq_core.errors import check_extra
from dpq_core.machine.device import settle_thread, share_machine
from dpq_core.recipe import ExecutionSection
from infra.orchestration.tls import share_tls_context
from tasks.support.worker import OwnDevices, become_worker, of_a_worker

_Result = TypeVar("_Result")


def task_runner(execution: ExecutionSection) -> TaskRunner[Any]:
    """The runner that a recipe asks for, with no more workers than it says.

    Raises:
        MissingExtraError: Dask is not installed.
    """
    share_tls_context()
    if execution.runner == "dask":
        check_extra("execution.runner: dask", "dask", "prefect_dask")
        from flows.running.dask_runner import LayersOnDask  # a second

        return LayersOnDask.of(execution)
    return _Processes(execution) if execution.runner == "processes" else _Threads(execution)


class _Threads(ThreadPoolTaskRunner[Any]):
    """Prefect's, whose threads have a device each."""

    def __init__(self, execution: ExecutionSection) -> None:
        super().__init__(max_workers=1)  # until it is known how many devices there are
        self._execution = execution

    def duplicate(self) -> Self:
        return type(self)(self._execution)

    def __enter__(self) -> Self:
        self._devices = OwnDevices(self._execution)
        self._left = iter(self._devices.names)
        self._max_workers = len(self._devices.names)
        return super().__enter__()

    def _register_worker_thread(self) -> None:
        """Called once in each thread."""
        super()._register_worker_thread()
        settle_thread(self._execution.threads_per_worker)
        become_worker(next(self._left), of_process=False)

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        if _told_to_stop(exc_type) and self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
        super().__exit__(exc_type, exc_value, traceback)
        self._devices.release()


class _Processes(ProcessPoolTaskRunner):
    """Prefect's, whose processes have a device each.

    Its pool's own thread would die of what is no `Exception`, and with it every future would wait
    for ever: a task whose server goes away is ended by `asyncio.CancelledError`.
    """

    def __init__(self, execution: ExecutionSection) -> None:
        super().__init__(max_workers=1)
        self._execution = execution

    def duplicate(self) -> Self:
        return type(self)(self._execution)

    def __reduce__(self) -> tuple[Any, ...]:
        return of_a_worker()

    def __enter__(self) -> Self:
        self._devices = OwnDevices(self._execution)
        self._max_workers = len(self._devices.names)
        left = multiprocessing.get_context("spawn").SimpleQueue()
        for name in self._devices.names:
            left.put(name)
        self._initializer = _start_worker
        self._initargs = (self._execution.threads_per_worker, left)
        super().__enter__()
        assert self._executor is not None
        self._executor.submit = partial(self._executor.submit, _interrupted)  # type: ignore[method-assign, arg-type]
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        if _told_to_stop(exc_type):
            for process in multiprocessing.active_children():
                process.kill()
        super().__exit__(exc_type, exc_value, traceback)
        if self._subprocess_message_queue is not None:
            # Of a worker that was killed while it sent something: the lock is never let go, and who
            # waits at the end for what is still to be sent waits for ever.
            self._subprocess_message_queue.cancel_join_thread()
        self._devices.release()


def _told_to_stop(exc_type: type[BaseException] | None) -> bool:
    """Whether a block ends by Ctrl-C or a signal: no error of what runs in it."""
    return exc_type is not None and not issubclass(exc_type, Exception)


class TaskInterruptedError(RuntimeError):
    """A worker's task was ended by something other than an error of its own."""


def _interrupted(call: Callable[[], _Result]) -> _Result:
    """`call()`, in a worker."""
    try:
        return call()
    except Exception:
        raise
    except BaseException as error:
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise TaskInterruptedError(
            f"a worker's task was interrupted ({said}), by a Prefect server that went away perhaps:"
            " run again: what is finished is kept"
        ) from error


def _start_worker(threads: int, devices: "SimpleQueue[str]") -> None:
    """Called once in each process. Ctrl-C is for the parent, without which there is no worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    share_tls_context()
    become_worker(devices.get(), of_process=True)
    share_machine(threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
