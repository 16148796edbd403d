"""Time a model on a device, a task for each kind of device, and log what was found."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.benchmark.formats_timed import Source
from dpq_core.benchmark.throughput import CANDIDATE, RATIO_BATCH, Times, measure
from dpq_core.machine.device import DeviceError, resolve_device
from dpq_core.recipe import BenchmarkSection, Recipe
from dpq_core.verdict.pairing import Failure
from infra.registry.tracking import TrackedRun
from tasks.support.environment import hardware
from tasks.support.isolated_process import alone_in_process
from tasks.support.progress import progress_of
from tasks.support.speeds import NOT_HERE, as_records, markdown, metrics

THROUGHPUT = "throughput_tokens_per_second"  # metric of a run: W4A8, decoding one sequence
_WIDTH = 720  # of a plot, pixels
_BUSY = 0.5  # of the cores, before we begin


@task(name="benchmark", task_run_name="benchmark on {device}", cache_policy=NO_CACHE)
def time_on(recipe: Recipe, source: Source, device: str) -> Times:
    """All variants of a model at all batches, in a process that has the machine to itself; where
    there is no such device, the result says so."""
    try:
        found = resolve_device(device)
    except DeviceError:
        return Times(device, wrong=f"{NOT_HERE}: this machine has no {device} device")
    report = progress_of(f"benchmark on {device}")
    busy = _load_before()
    times: Times = alone_in_process(measure, source, recipe.benchmark, found, report=report)
    return replace(times, hardware=_machine(device), notes=(*times.notes, *busy))


def ratios(devices: Sequence[Times]) -> dict[str, float | Failure]:
    """Decoding speed of W4A8 over BF16, by device, or why there is none."""
    found = {times.device: times.ratio() for times in devices}
    return {name: Failure(r) if isinstance(r, str) else r for name, r in found.items()}


def log_benchmark(
    run: TrackedRun, title: str, section: BenchmarkSection, devices: Sequence[Times]
) -> None:
    """To MLflow: metrics, the table, `benchmark.json` with all that is known, `benchmark.md` for a
    log, and a plot for each device that was there."""
    run.log_metrics({**metrics(devices), **_speed(devices)})
    run.log_table(as_records(devices), "benchmark_table")
    about = {"title": title, "asked": section.model_dump(mode="json")}
    run.log_dict({**about, "devices": [asdict(times) for times in devices]}, "benchmark.json")
    run.log_text(markdown(title, devices), "benchmark.md")
    from tasks.support.report_figures import batches_figure  # matplotlib: a second

    for times in devices:
        if times.cells:
            run.log_figure(batches_figure(times, _WIDTH), f"benchmark-{times.device}.png")


def _speed(devices: Sequence[Times]) -> Mapping[str, float]:
    """Ratios by device, and the one speed that versions are compared by: of the first device."""
    found = {f"benchmark.{d}.throughput_ratio": r for d, r in ratios(devices).items()}
    numbers = {name: r for name, r in found.items() if not isinstance(r, Failure)}
    for cell in devices[0].cells if devices else ():
        if (cell.variant, cell.batch) == (CANDIDATE, RATIO_BATCH) and not cell.wrong:
            assert cell.decode_tokens_per_second is not None
            numbers[THROUGHPUT] = cell.decode_tokens_per_second
    return numbers


def _machine(device: str) -> str:
    about = hardware(device)
    if device == "cuda":
        return about["device"]
    cores = len(os.sched_getaffinity(0))
    return f"{about['processor']}, cores: {cores}, {about['memory']}" if device == "cpu" else device


def _load_before() -> list[str]:
    """A line where others compute on this machine."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load <= _BUSY * cores:
        return []
    return [f"the machine was busy before: load {load:.1f}, cores for this process: {cores}"]
