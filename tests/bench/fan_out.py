"""How the quantize stage grows with its workers, and what orchestration adds to plain Python.

    python tests/bench/fan_out.py [--blocks 15] [--repeats 1]

A Llama of random weights, hidden 768, seven layers a block. It is calibrated once; then its layers
are quantized from the same statistics, one thread each:

    plain        one after the other, in a loop: no Prefect, no store
    1 worker     `flows.quantize` on a Prefect server and the store, one worker process
    2 workers    the same on two

A repeat runs all three in turn. Wanted: 2 workers at least 1.7 times as fast as 1 worker, and
1 worker within 10 % of plain. Workers' start (imports, seconds) is in their times.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from peak_memory import make_model
from prefect import flow

from dpq_core.checkpoint import save_layer
from dpq_core.device import share_machine
from dpq_core.plan import Plan
from dpq_core.quantize import quantize_or_keep
from dpq_core.reader import CheckpointReader
from dpq_core.recipe import Recipe, parse_recipe
from flows.quantize import quantize_layers
from flows.runners import task_runner
from infra.services import services
from infra.store import ArtifactRef, Store
from tasks.calibrate import load_statistics
from tasks.preflight import preflight

WANTED, ALLOWED = 1.7, 0.10


@flow(name="fan out")
def stage(recipe: Recipe) -> tuple[float, Plan, dict[str, ArtifactRef]]:
    """Seconds from the first layer's submission to the last one's artifact; calibration is found
    in the store, but in the first run."""
    share_machine(1)
    inputs = preflight(recipe)
    started = time.perf_counter()
    _, statistics = quantize_layers(recipe, inputs)
    return time.perf_counter() - started, inputs.plan, statistics


def plain(recipe: Recipe, plan: Plan, statistics: dict[str, ArtifactRef], folder: Path) -> float:
    """Seconds of the same arithmetic in a loop."""
    share_machine(1)
    reader, store = CheckpointReader(Path(recipe.model.id)), Store(recipe.execution.store)
    started = time.perf_counter()
    for layer in plan.layers:
        weight = reader.tensor(f"{layer.name}.weight")
        of_input = load_statistics(statistics[layer.statistics], store)
        tokens = recipe.calibration.min_tokens_per_input
        quantized = quantize_or_keep(weight, of_input, layer.scheme, tokens)
        target = folder / layer.name
        target.mkdir()
        save_layer(target, quantized)
    return time.perf_counter() - started


def recipe_of(folder: Path, blocks: int) -> Recipe:
    make_model(folder / "model", "150m", blocks)
    text = folder / "text.txt"
    text.write_text("\n".join(chr(97 + number % 26) * 600 for number in range(64)))
    return parse_recipe(
        {
            "model": {"id": str(folder / "model")},
            "calibration": {
                "dataset": {"path": "text", "data_files": str(text)},
                "samples": 8,
                "sequence_length": 512,
            },
            "evaluation": {"perplexity": {"dataset": {"path": "text", "data_files": str(text)}}},
            "execution": {"store": str(folder / "store"), "device": "cpu", "runner": "processes"},
        }
    )


def measure(recipe: Recipe, folder: Path, repeats: int) -> None:
    def fan_out(workers: int) -> tuple[float, Plan, dict[str, ArtifactRef]]:
        execution = recipe.execution.model_copy(update={"workers": workers})
        shutil.rmtree(Path(recipe.execution.store, "layers"), ignore_errors=True)
        with_workers = stage.with_options(task_runner=task_runner(execution))
        return with_workers(recipe.model_copy(update={"execution": execution}))

    _, plan, statistics = fan_out(2)
    print(f"{len(plan.layers)} layers\n\n| plain s | 1 worker s | 2 workers s | overhead | gain |")
    print("|---|---|---|---|---|", flush=True)
    for repeat in range(repeats):
        (folder / f"plain-{repeat}").mkdir()
        loop = plain(recipe, plan, statistics, folder / f"plain-{repeat}")
        one, two = fan_out(1)[0], fan_out(2)[0]
        overhead, gain = one / loop - 1, one / two
        print(f"| {loop:.1f} | {one:.1f} | {two:.1f} | {overhead:+.1%} | {gain:.2f} |", flush=True)
        print(f"  within {ALLOWED:.0%}: {overhead < ALLOWED}; at least {WANTED}: {gain >= WANTED}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_of(folder, arguments.blocks)
        with services(folder / "home"):
            measure(recipe, folder, arguments.repeats)


if __name__ == "__main__":
    main()
