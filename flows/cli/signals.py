"""How a command that is told to stop ends: in seconds, with its runs marked and nothing lost.

SIGTERM and Ctrl-C become an exception in the main thread. On its way out the flow's workers are
left (`flows.running.runners`), MLflow's run is marked KILLED and Prefect's crashed, the shared
server goes with its last user, and `flows.cli.main` ends the process with 143 or 130 although
threads still compute.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PATIENCE = 30.0  # s, for a service that does not answer, before the process ends all the same
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ended(KeyboardInterrupt):
    """The process was told to stop."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"ended by {signal.Signals(number).name}")

    @property
    def exit_code(self) -> int:
        return 128 + self.number


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Raise `Ended` for the first signal that comes while the block runs; a second one would leave
    servers behind and changes nothing. To be called in the main thread.

    Raises:
        Ended: a signal came, whatever went wrong afterwards.
    """
    timer: threading.Timer | None = None
    ended: Ended | None = None

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal ended, timer
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        ended = Ended(number)
        timer = threading.Timer(_PATIENCE, os._exit, [ended.exit_code])
        timer.daemon = True
        timer.start()
        raise ended

    before = {number: signal.signal(number, end) for number in _SIGNALS}
    try:
        yield
    except BaseException:
        if ended:
            raise ended from None
        raise
    finally:
        if timer:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_codes() -> tuple[int, ...]:
    """Exit codes of processes that were told to stop."""
    return tuple(128 + number for number in _SIGNALS)


def undelivered() -> bool:
    """Whether Prefect still has something for a server that did not take it in time, and is gone
    perhaps: at exit Prefect would go on trying, ten seconds an event."""
    return any(thread.name in _SENDERS for thread in threading.enumerate())


_SENDERS = ("EventsWorkerThread", "APILogWorkerThread")  # prefect's; they end when all is sent


def leave_threads(code: int) -> None:
    """End the process now if threads still compute or send, for which Python would wait."""
    others = (each for each in threading.enumerate() if each is not threading.main_thread())
    if any(not thread.daemon or thread.name in _SENDERS for thread in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
