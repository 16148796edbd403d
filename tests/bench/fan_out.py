"""How the quantize stage grows with its workers, and what orchestration adds to plain Python.

    python tests/bench/fan_out.py [--model 150m|600m] [--blocks 15] [--repeats 1]

A Llama of random weights, seven layers a block. It is calibrated once; then its layers are
quantized from the same statistics, one thread each:

    plain        one after the other, in a loop: no Prefect, no store
    1 worker     `flows.quantize` on a Prefect server and the store, one worker process
    2 workers    the same on two

A task has the layers that read one input, four a block; plain Python shares their factor too.
A repeat runs all three in turn. Wanted: 2 workers at least 1.7 times as fast as 1 worker, and
1 worker within 15 % of plain. Where others use the machine the worker's CPU seconds count, beside
those of plain. Workers' start (imports, seconds, once a run) is shown apart: plain Python has
imported all before its time begins, too.
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path

import psutil
from peak_memory import MODELS, make_model
from prefect import flow, task
from prefect.futures import wait

from dpq_core.checkpoint.native import save_layer
from dpq_core.layer.quantize import quantize_or_keep
from dpq_core.layer.shared_input import SharedInput
from dpq_core.machine.device import share_machine
from dpq_core.model.plan import Plan, readers_of_one_input
from dpq_core.model.reader import CheckpointReader
from dpq_core.recipe import Recipe, parse_recipe
from flows.quantize import quantize_layers
from flows.running.runners import task_runner
from infra.orchestration.services import services
from infra.store import ArtifactRef, Store
from tasks.calibrate import load_statistics
from tasks.preflight import preflight

WANTED, ALLOWED = 1.7, 0.15


@dataclass(frozen=True)
class Stage:
    """seconds: from the first layer's submission to the last one's artifact. cpu: of workers in
    that time. start: of workers."""

    seconds: float
    cpu: float
    start: float
    plan: Plan
    statistics: dict[str, ArtifactRef]


@task
def wait_for_all(workers: int) -> None:
    """Ends when as many have begun: each worker has one."""
    import flows.quantize  # noqa: F401  what a layer's task imports

    time.sleep(workers)


@flow(name="fan out")
def stage(recipe: Recipe) -> Stage:
    """Calibration is found in the store, but in the first run."""
    share_machine(1)
    inputs = preflight(recipe)
    began, workers = time.perf_counter(), recipe.execution.workers
    wait([wait_for_all.submit(workers) for _ in range(workers)])
    started, cpu = time.perf_counter(), _cpu_of_workers()
    made = quantize_layers(recipe, inputs)
    seconds, cpu = time.perf_counter() - started, _cpu_of_workers() - cpu
    return Stage(seconds, cpu, started - began - workers, inputs.plan, made.statistics)


def _cpu_of_workers() -> float:
    times = [psutil.Process(each.pid).cpu_times() for each in active_children()]
    return sum(each.user + each.system for each in times)


def plain(
    recipe: Recipe, plan: Plan, statistics: dict[str, ArtifactRef], folder: Path
) -> tuple[float, float]:
    """Seconds, and of the CPU, of the same arithmetic in a loop."""
    share_machine(1)
    reader, store = CheckpointReader(Path(recipe.model.id)), Store(recipe.execution.store)
    started, cpu = time.perf_counter(), time.process_time()
    tokens = recipe.calibration.min_tokens_per_input
    for readers in readers_of_one_input(plan.layers):
        shared = SharedInput(load_statistics(statistics[readers[0].statistics], store))
        for layer in readers:
            weight = reader.tensor(f"{layer.name}.weight")
            target = folder / layer.name
            target.mkdir()
            save_layer(target, quantize_or_keep(weight, shared, layer.scheme, tokens))
    return time.perf_counter() - started, time.process_time() - cpu


def recipe_of(folder: Path, model: str, blocks: int) -> Recipe:
    make_model(folder / "model", model, blocks)
    text = folder / "text.txt"
    text.write_text("\n".join(chr(97 + number % 26) * 600 for number in range(64)))
    return parse_recipe(
        {
            "model": {"id": str(folder / "model")},
            "calibration": {
                "dataset": {"path": "text", "data_files": str(text)},
                "samples": 8,
                "sequence_length": 512,
                "required_tokens_per_input": 0,
            },
            "evaluation": {"perplexity": {"dataset": {"path": "text", "data_files": str(text)}}},
            "execution": {"store": str(folder / "store"), "device": "cpu", "runner": "processes"},
        }
    )


def measure(recipe: Recipe, folder: Path, repeats: int) -> None:
    def fan_out(workers: int) -> Stage:
        execution = recipe.execution.model_copy(update={"workers": workers})
        shutil.rmtree(Path(recipe.execution.store, "layers"), ignore_errors=True)
        with_workers = stage.with_options(task_runner=task_runner(execution))
        return with_workers(recipe.model_copy(update={"execution": execution}))

    first = fan_out(2)
    print(f"{len(first.plan.layers)} layers; workers' start {first.start:.1f} s\n")
    print("| plain s | 1 worker s | 2 workers s | overhead | gain | plain, 1 worker CPU s | |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for repeat in range(repeats):
        target = folder / f"plain-{repeat}"
        target.mkdir()
        loop, cpu = plain(recipe, first.plan, first.statistics, target)
        alone = fan_out(1)
        one, two = alone.seconds, fan_out(2).seconds
        overhead, gain = one / loop - 1, one / two
        row = f"| {loop:.1f} | {one:.1f} | {two:.1f} | {overhead:+.1%} | {gain:.2f} "
        print(f"{row}| {cpu:.1f}, {alone.cpu:.1f} | {alone.cpu / cpu - 1:+.1%} |", flush=True)
        print(f"  within {ALLOWED:.0%}: {overhead < ALLOWED}; at least {WANTED}: {gain >= WANTED}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="150m")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        recipe = recipe_of(folder, arguments.model, arguments.blocks)
        with services(folder / "home"):
            measure(recipe, folder, arguments.repeats)


if __name__ == "__main__":
    main()
