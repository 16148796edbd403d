"""Work that wants the machine for itself: in a fresh process, with all cores.

A process that has served Prefect and loaded models has threads, arenas and caches of its own, and
its measurements of time and memory would depend on what it did before.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from dpq_core.machine.device import whole_machine

Progress = Callable[[int, int], None]


class ProcessLostError(RuntimeError):
    """A process that was killed from outside while it worked for us."""


def alone_in_process(function: Callable[..., Any], *arguments: Any, report: Progress) -> Any:
    """`function(*arguments, report)` in a process of its own, which ends with this call. Function,
    arguments and result travel by pickle.

    Raises:
        What the function raises. ProcessLostError: the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, content = ours.recv()
            if kind == "result":
                return content
            if kind == "error":
                raise content
            report(*content)
    except EOFError as error:
        raise ProcessLostError(
            f"{function.__name__}: its process was killed, for lack of memory perhaps: ask for less"
            " at a time"
        ) from error
    finally:
        process.kill()
        process.join()


def _work(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Ctrl-C is for the parent, which ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report(done: int, total: int) -> None:
        connection.send(("progress", (done, total)))

    try:
        with whole_machine():
            result = function(*arguments, report)
    except Exception as error:
        error.add_note(traceback.format_exc())
        connection.send(("error", error))
    else:
        connection.send(("result", result))
