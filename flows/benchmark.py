"""Throughput: variants of one model timed side by side, a task for each kind of device."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger

from dpq_core.benchmark.formats_timed import Checkpoint, Shape, Source
from dpq_core.benchmark.throughput import Times, check_context
from dpq_core.errors import one_line
from dpq_core.machine.device import share_machine
from dpq_core.recipe import DeviceKind, Recipe, RecipeError
from flows.release.candidate import Attempt, gate
from flows.running.liveness import attended
from infra.registry.tracking import TrackedRun, tracked_run, tracking_store
from infra.settings import home
from infra.store import Store
from tasks.benchmark import log_benchmark, ratios, time_on
from tasks.evaluate import Measured
from tasks.support.model import inspect
from tasks.support.speeds import NOT_HERE, as_records

DEVICES: tuple[DeviceKind, ...] = get_args(DeviceKind)


@dataclass(frozen=True)
class Benchmark:
    """What came of it. log: address of its section for a log, Markdown."""

    title: str
    run_id: str
    devices: list[Times]
    log: str

    def as_dict(self) -> dict[str, Any]:
        """The object that `dpq bench --json` prints."""
        found = ratios(self.devices)
        return {
            "title": self.title,
            "run_id": self.run_id,
            "log": self.log,
            "rows": as_records(self.devices),
            "throughput_ratio": {k: r if isinstance(r, float) else None for k, r in found.items()},
            "devices": [
                {key: value for key, value in asdict(times).items() if key != "cells"}
                for times in self.devices
            ],
        }


@flow(name="benchmark")
@attended
def benchmark(
    recipe: Recipe,
    devices: Sequence[DeviceKind] = (),
    shape: str | None = None,
    checkpoint: str | None = None,
) -> Benchmark:
    """Time BF16, FP8, W4A16 and W4A8 of a recipe's model, as its section `benchmark` says.

    Args:
        devices: kinds, in place of the recipe's; where neither names any, all that there are.
        shape: a row of `dpq_core.benchmark.formats_timed.SHAPES` in place of the recipe's model:
        random weights. checkpoint: folder of the model's native checkpoint, which stands for W4A8;
        else the model
            is rounded to nearest at load, which takes the same time.

    Raises:
        RecipeError: both a shape and a checkpoint. CheckpointError, ContextError, VariantError:
            one line that says what and where.
    """
    if shape and checkpoint:
        raise RecipeError("a shape has random weights, and no checkpoint: give one of the two")
    share_machine(recipe.execution.threads_per_worker)
    source = _source(recipe, shape, checkpoint)
    check_context(source.empty().config.get_text_config(), recipe.benchmark)
    for variant in recipe.benchmark.variants:
        source.linears(variant)
    kinds = list(devices or recipe.benchmark.devices or DEVICES)
    title = shape or recipe.registered_name
    tracking_uri, artifact_root = tracking_store(home())
    tags = {"recipe_digest": recipe.digest, "benchmark": title}
    name, experiment = f"benchmark {title}", recipe.registry.experiment
    with tracked_run(tracking_uri, experiment, name, tags, artifact_root) as run:
        times = [_time(recipe, source, kind) for kind in kinds]
        publish_times(run, title, recipe, times)
        return Benchmark(title, run.run_id, times, run.link("benchmark.md"))


def with_benchmark(baseline: Measured, attempt: Attempt) -> tuple[Attempt, list[Times]]:
    """The attempt judged with its speed on the devices that its recipe names, if any; to be called
    in a flow. What cannot be timed is no error of the release: the gate, if asked for, fails."""
    recipe, candidate = attempt.recipe, attempt.candidate
    if not recipe.benchmark.devices:
        return attempt, []
    source = Checkpoint.of(recipe, candidate.inputs.model.folder, candidate.checkpoint.folder)
    times = [_times_or_error(recipe, source, kind) for kind in recipe.benchmark.devices]
    found = ratios(times)
    verdict = gate(recipe, baseline, attempt.measured, candidate, found)
    return replace(attempt, verdict=verdict, ratios=found), times


def publish_times(run: TrackedRun, title: str, recipe: Recipe, times: Sequence[Times]) -> None:
    """To MLflow, and as a table on the Prefect run's page; nothing where nothing was asked."""
    if times:
        log_benchmark(run, title, recipe.benchmark, times)
        create_table_artifact(as_records(times), key="benchmark", description=f"Speed of {title}")


def _source(recipe: Recipe, shape: str | None, checkpoint: str | None) -> Source:
    if shape:
        return Shape.named(shape, recipe.scheme)
    model = inspect(recipe.model, Store(recipe.execution.store), recipe.scheme.keeps)
    return Checkpoint.of(recipe, model.folder, Path(checkpoint) if checkpoint else None)


def _time(recipe: Recipe, source: Source, kind: DeviceKind) -> Times:
    """By a task with the tag of its device, by which Prefect can limit how many run at a time."""
    return time_on.with_options(tags=[kind])(recipe, source, kind)


def _times_or_error(recipe: Recipe, source: Source, kind: DeviceKind) -> Times:
    try:
        return _time(recipe, source, kind)
    except Exception as error:  # of one device: the others, and the release, go on
        get_run_logger().exception("benchmark on %s failed", kind)
        said = one_line(error)
        return Times(kind, wrong=f"{NOT_HERE}: {type(error).__name__}: {said}")
