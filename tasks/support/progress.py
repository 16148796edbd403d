"""How far a stage is: tasks report steps, whoever runs them decides what to show.

The reporter travels in a context variable, not in task parameters, which Prefect records.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# (stage, steps done, steps in all). Half a step is 0.5; None: as told before.
Reporter = Callable[[str, float, float | None], None]

_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextmanager
def reporting_to(reporter: Reporter) -> Iterator[None]:
    """Send the steps of all tasks that run inside to `reporter`."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


def progress_of(stage: str) -> Callable[[float, float | None], None]:
    """A function to call with the steps of a stage that are done, and those in all."""
    reporter = _reporter.get()

    def report(done: float, total: float | None) -> None:
        if reporter:
            reporter(stage, done, total)

    return report


def stepper(stage: str, total: int) -> Callable[[], None]:
    """A function to call after each of `total` steps of a stage."""
    report, done = progress_of(stage), 0
    report(0, total)

    def step() -> None:
        nonlocal done
        done += 1
        report(done, total)

    return step


def parts_of_step(stage: str, done: int, parts: int) -> Callable[[], None]:
    """A function to call after each part of the step that follows `done` steps of a stage; of how
    many steps it has, its `stepper` has told."""
    report, ready = progress_of(stage), 0

    def step() -> None:
        nonlocal ready
        ready += 1
        report(done + min(ready / parts, 1.0), None)

    return step
