"""What every flow does at its ends: say that it is at work, and clear up after those that died."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from dpq_core.recipe import ExecutionSection
from infra.orchestration.dead_runs import label_flow_run, mark_dead_runs
from infra.registry.tracking import tracking_store
from infra.settings import home
from infra.store import Store
from infra.store.owners import Attendance


class _Recipe(Protocol):
    """A recipe of any pipeline."""

    @property
    def execution(self) -> ExecutionSection: ...


_Kind = TypeVar("_Kind", bound=_Recipe)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Flow = Callable[Concatenate[_Kind, _Arguments], _Result]


def attended(flow: _Flow[_Kind, _Arguments, _Result]) -> _Flow[_Kind, _Arguments, _Result]:
    """A flow's function, whose process is known to be alive while it runs: to the store, which
    keeps what it uses, and to later runs, which mark those of the dead."""

    @wraps(flow)
    def run(
        recipe: _Kind, /, *arguments: _Arguments.args, **keywords: _Arguments.kwargs
    ) -> _Result:
        attendance = Attendance(home().resolve() / "runs")
        with attendance.present() as owner, Store(recipe.execution.store).in_use():
            label_flow_run(owner)
            mark_dead_runs(tracking_store(home())[0], attendance)
            return flow(recipe, *arguments, **keywords)

    return run
