"""How far a run is, a line a stage on stderr: on a terminal bars with the time left; elsewhere a
line when a stage starts, one when it ends, and one between for each tenth, a minute apart at least,
whose numbers only rise."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from infra.store.leases import telling_of_waits
from tasks.support.progress import reporting_to

_KNOWN = 0.05  # of the steps after the first: from then on the time left is shown
_APART = 60.0  # s between two lines of a stage


class Pace:
    """The pace of one stage; times in seconds of a clock that only rises.

    The time left is that of the steps to come at the mean of those so far, and shrinks with the
    clock between two of them. The first step is left out: it loads and compiles.
    """

    def __init__(self, total: float, now: float) -> None:
        self.total, self.done = total, 0.0
        self.started = self.last = now
        self._first: tuple[float, float] | None = None  # steps and time when the first was done

    @property
    def ended(self) -> bool:
        return self.done >= self.total

    def advance(self, done: float, now: float) -> None:
        """So many steps are done."""
        if done > self.done:
            self.done, self.last = done, now
            self._first = self._first or (done, now)

    def left(self, now: float) -> float | None:
        """None while it cannot be said."""
        if self.ended or self._first is None:
            return None
        first, since = self._first
        if self.done - first < _KNOWN * (self.total - first):
            return None
        to_come = (self.last - since) * (self.total - self.done) / (self.done - first)
        return max(0.0, to_come - (now - self.last))


@contextmanager
def progress() -> Iterator[None]:
    """Show the stages that run inside."""
    console = Console(stderr=True)
    shown = _Bars(console) if console.is_terminal else _Lines(console)
    with (
        shown,
        reporting_to(shown.report),
        telling_of_waits(lambda line: console.print(line, style="dim")),
    ):
        yield


class _Shown:
    """Stages by name. One that is reported from the start again begins anew."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._stages: dict[str, Pace] = {}

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def report(self, stage: str, done: float, total: float | None) -> None:
        """Report how far a task is. total: None where it has been told."""
        now, pace = time.monotonic(), self._stages.get(stage)
        if pace is None or done < pace.done:
            if not total:
                return  # nothing to do
            pace = self._stages[stage] = Pace(total, now)
            self.started(stage, pace)
        elif pace.ended:
            return
        pace.total = total or pace.total
        pace.advance(done, now)
        self.moved(stage, pace, now)

    def started(self, stage: str, pace: Pace) -> None:
        raise NotImplementedError

    def moved(self, stage: str, pace: Pace, now: float) -> None:
        raise NotImplementedError


class _Lines(_Shown):
    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._told: dict[str, tuple[float, float]] = {}  # steps and time of a stage's last line

    def started(self, stage: str, pace: Pace) -> None:
        self._tell(stage, pace, f"{stage} …", pace.started)

    def moved(self, stage: str, pace: Pace, now: float) -> None:
        done, before = self._told[stage]
        taken = shown_time(now - pace.started)
        if pace.ended:
            self._tell(stage, pace, f"{stage}: done in {taken}", now)
        elif now - before >= _APART and int(10 * pace.done / pace.total) > int(
            10 * done / pace.total
        ):
            percent = int(100 * pace.done / pace.total)
            self._tell(stage, pace, f"{stage}: {percent} % in {taken}", now)

    def _tell(self, stage: str, pace: Pace, line: str, now: float) -> None:
        self._told[stage] = pace.done, now
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Bars(_Shown):
    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Time(),
            console=console,
        )
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> None:
        self._bars.start()

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def started(self, stage: str, pace: Pace) -> None:
        if stage in self._rows:
            self._bars.reset(self._rows[stage], total=pace.total, pace=pace)
        else:
            self._rows[stage] = self._bars.add_task(stage, total=pace.total, pace=pace)

    def moved(self, stage: str, pace: Pace, now: float) -> None:
        self._bars.update(self._rows[stage], completed=pace.done, total=pace.total)


class _Time(ProgressColumn):
    """What a stage took, or has left."""

    def render(self, task: Task) -> Text:
        pace: Pace = task.fields["pace"]
        if pace.ended:
            return Text(shown_time(pace.last - pace.started))
        left = pace.left(time.monotonic())
        return Text("…" if left is None else f"{shown_time(left)} left")


def shown_time(seconds: float) -> str:
    """Coarse on purpose: `40 s`, `3 min`, `2 h 10 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
