"""What a large model takes, from shapes and from constants measured here.

    python tests/bench/scale.py [--tokens 262144]

Measured (CPU time, so that a busy machine counts little): accumulating a Hessian, quantizing a
layer by the default scheme, SHA-256 with writing and reading an artifact; and, in wall time, tasks
a second through a Prefect server of its own. Computed: the same for Llama shapes, in operations
and bytes. Operations of a layer [m, n]: Hessian 2 T n² and factor n³ once an input; column loop
2 m n², and 4 m n² a pass of gradient-aware rounding. An evaluation of the ten suites and the
papers' perplexity: what is in hand, on the device, and read (`dpq_core/evaluation/room.py`). Then a
simulation of releases on 1, 8 and 64 GPUs, before and after what locality there is
(`scale_simulation.py`).
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from scale_shapes import SHAPES, Shape
from scale_simulation import Rates, table

from dpq_core.data.mirrored_suites import MIRRORED
from dpq_core.evaluation.grain import ACCELERATOR
from dpq_core.evaluation.room import Sizes
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.quantize import quantize_layer
from dpq_core.recipe.scheme import Scheme
from flows.cli import forecast
from infra.orchestration.services import services
from infra.store import Store

TASKS = 200
FEATURES = (512, 1024, 2048)


def operations(shape: Shape, tokens: int, passes: int) -> tuple[float, float, float]:
    """Floating-point operations: forward, Hessians, layers."""
    forward = 2.0 * tokens * shape.weights
    hessians = shape.blocks * sum(2.0 * tokens * n**2 for n, _ in shape.inputs())
    layers = shape.blocks * sum(
        n**3 + (2 + 4 * passes) * sum(rows) * float(n) ** 2 for n, rows in shape.inputs()
    )
    return forward, hessians, layers


def traffic(shape: Shape, tokens: int) -> dict[str, float]:
    """Bytes that a release moves through the store, by what they are."""
    hessians = shape.blocks * sum(4 * n**2 for n, _ in shape.inputs())
    hidden = 2 * shape.blocks * tokens * shape.hidden
    once_a_layer = shape.blocks * sum(4 * n**2 * len(rows) for n, rows in shape.inputs())
    return {
        "checkpoint read, twice": 2 * 2 * (shape.weights + shape.other),
        "Hessians written": hessians,
        "Hessians read, once a layer": once_a_layer,
        "Hessians read, once an input": hessians,
        "hidden states written, and read by two passes": 3 * hidden,
        "hidden states at every eighth block": 2 * hidden / 8,
        "layers written and read": 2 * 0.53 * shape.weights,
        "release written": 0.53 * shape.weights + 2 * shape.other,
    }


def asked_tokens() -> float:
    """Of the ten suites (no examples) and the papers' WikiText-2, what is shared counted once."""
    suites = sum(
        characters * MIRRORED[name].splits[MIRRORED[name].scored]
        for name, characters in forecast._CHARACTERS.items()
    )
    return (suites + sum(forecast._HUB.values())) / forecast._PER_TOKEN


def evaluation(shape: Shape, host: int) -> dict[str, float]:
    """Bytes of one worker that evaluates a model, on a host with so many."""
    sizes = Sizes(
        weights=shape.weights + shape.other,
        block=shape.weights // shape.blocks,
        embedding=shape.other // 2,
        hidden=shape.hidden,
        widest=shape.intermediate,
    )
    in_hand = sizes.tokens_in_hand(host // 8)
    passes = math.ceil(asked_tokens() / in_hand)
    return {
        "the model": 2.0 * sizes.weights,
        "on the device": sizes.bytes_of(0, ACCELERATOR),
        "hidden states on the host": sizes.bytes_of(in_hand) - sizes.bytes_of(0),
        "read by all passes": 2.0 * sizes.weights * passes,
    }


def measured_rates() -> Iterator[tuple[str, float, str]]:
    """Name, rate, unit."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for n in FEATURES:
        x = torch.randn(4096, n, generator=generator).bfloat16()
        statistics = InputStatistics.empty(n)
        start = time.process_time()
        statistics.add_hessian(x)
        taken = time.process_time() - start
        yield f"Hessian, {n} features", 2 * len(x) * n**2 / taken / 1e9, "GFLOP/s"
        statistics.add_magnitudes(x)
        weight = torch.randn(n, n, generator=generator) / 50
        scheme = Scheme(max_passes=4)
        start = time.process_time()
        quantize_layer(weight, statistics, scheme)
        taken = time.process_time() - start
        count = n**3 + (2 + 4 * scheme.max_passes) * n**3
        yield f"layer {n} × {n}, 4 passes", count / taken / 1e9, "GFLOP/s"
    yield from _store_rates()
    yield "Prefect tasks, one flow, two threads", TASKS / _seconds_of_tasks(), "a second"


def _store_rates() -> Iterator[tuple[str, float, str]]:
    content = os.urandom(256 << 20)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        start = time.process_time()
        made, _ = store.get_or_make("bench", "0", lambda to: _fill(to / "bytes", content))
        yield "artifact written", len(content) / (time.process_time() - start) / 1e6, "MB/s"
        start = time.process_time()
        (store.open(made) / "bytes").read_bytes()
        yield (
            "artifact checked and read",
            len(content) / (time.process_time() - start) / 1e6,
            "MB/s",
        )


def _fill(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _seconds_of_tasks() -> float:
    with tempfile.TemporaryDirectory() as folder, services(Path(folder)):
        from prefect import flow, task
        from prefect.task_runners import ThreadPoolTaskRunner

        @task
        def nothing(number: int) -> int:
            return number

        @flow(task_runner=ThreadPoolTaskRunner(max_workers=2))
        def many() -> None:
            for future in [nothing.submit(number) for number in range(TASKS)]:
                future.result()

        start = time.perf_counter()
        many()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--host", type=int, default=512, help="GiB, of an evaluation")
    parser.add_argument("--computed", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    print("| model | layers | forward, PFLOP | Hessians, PFLOP | layers, PFLOP |")
    print("|---|---|---|---|---|")
    for shape in SHAPES:
        forward, hessians, layers = operations(shape, arguments.tokens, arguments.passes)
        count = shape.blocks * sum(len(rows) for _, rows in shape.inputs())
        print(
            f"| {shape.name} | {count} | {forward / 1e15:,.1f} | {hessians / 1e15:,.1f} |"
            f" {layers / 1e15:,.1f} |"
        )
    names = list(traffic(SHAPES[0], arguments.tokens))
    print(f"\n| GB | {' | '.join(names)} | largest Hessian |\n|---|{'---|' * (len(names) + 1)}")
    for shape in SHAPES:
        moved = traffic(shape, arguments.tokens)
        largest = 4 * shape.intermediate**2
        cells = [*moved.values(), largest]
        print(f"| {shape.name} | " + " | ".join(f"{each / 1e9:,.1f}" for each in cells) + " |")
    host = arguments.host << 30
    names = list(evaluation(SHAPES[0], host))
    print(f"\n{asked_tokens() / 1e6:.1f} million tokens asked; a host of {arguments.host} GiB")
    print(f"| GB | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for shape in SHAPES:
        cells = " | ".join(f"{each / 1e9:,.1f}" for each in evaluation(shape, host).values())
        print(f"| {shape.name} | {cells} |")
    print()
    for line in table(SHAPES, arguments.tokens, arguments.passes, Rates()):
        print(line)
    if arguments.computed:
        return
    print("\n| measured here | rate |\n|---|---|")
    for name, rate, unit in measured_rates():
        print(f"| {name} | {rate:,.1f} {unit} |", flush=True)


if __name__ == "__main__":
    main()
