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
from typing import Any, Self, TypeVar

from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from dpq_core.device import share_machine
from dpq_core.errors import check_extra
from dpq_core.recipe import ExecutionSection

_Result = TypeVar("_Result")


def task_runner(execution: ExecutionSection) -> TaskRunner[Any]:
    """The runner that a recipe asks for, with no more workers than it says.

    Raises:
        MissingExtraError: Dask is not installed.
    """
    if execution.runner == "dask":
        check_extra("execution.runner: dask", "dask", "prefect_dask")
        from flows.dask_runner import LayersOnDask  # a second

        return LayersOnDask.of(execution)
    if execution.runner == "processes":
        return _Processes(
            max_workers=execution.workers,
            initializer=_start_worker,
            initargs=(execution.threads_per_worker,),
        )
    return _Threads(max_workers=execution.workers)


class _Threads(ThreadPoolTaskRunner[Any]):
    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        if _told_to_stop(exc_type) and self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
        super().__exit__(exc_type, exc_value, traceback)


class _Processes(ProcessPoolTaskRunner):
    """Prefect's, whose pool's own thread would die of what is no `Exception`, and with it every
    future would wait for ever: a task whose server goes away is ended by `asyncio.CancelledError`.
    """

    def __enter__(self) -> Self:
        super().__enter__()
        assert self._executor is not None
        self._executor.submit = partial(self._executor.submit, _interrupted)  # type: ignore[method-assign, arg-type]
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        if _told_to_stop(exc_type):
            for process in multiprocessing.active_children():
                process.kill()
        super().__exit__(exc_type, exc_value, traceback)


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


def _start_worker(threads: int) -> None:
    """Called once in each process. Ctrl-C is for the parent, without which there is no worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    share_machine(threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
