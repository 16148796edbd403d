"""Writes that go on while the next thing is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType
from typing import Self, TypeVar

_Result = TypeVar("_Result")


class WriteBehind:
    """Calls made in order in a thread of its own, one behind: whoever asks for the next waits for
    the one before. An error is raised at the next call, or at the end of the block.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "write-behind")
        self._last: Future[object] | None = None

    def __call__(self, write: Callable[[], _Result]) -> "Future[_Result]":
        """Begin a call once the one before has ended."""
        self.wait()
        future = self._pool.submit(copy_context().run, write)
        self._last = future  # type: ignore[assignment]
        return future

    def wait(self) -> None:
        """Until everything is written."""
        last, self._last = self._last, None
        if last:
            last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                self.wait()
        finally:
            self._pool.shutdown()
