"""Where the time of quantizing goes: by stage, by layer's shape, and against its matrix products.

    python tests/bench/quantize.py [RECIPE] [--model 150m --blocks N] [--windows N] [--length N]
                                   [--set scheme.FIELD=VALUE ...] [--definition]

The model of a recipe, or a Llama of random weights (`peak_memory.py`) and random tokens, which do
for time and memory and say nothing about quality. Everything is what `quantize_checkpoint` runs,
once before the clock starts for a small layer (kernels are compiled), then once.

CPU seconds of this process, so that a busy machine counts little; a stage's own, without the
stages called from it. `peak`: the largest resident memory while the stage ran, above the memory
before the first one. The floor: every matrix product of the stage, alone, in the same process
afterwards; of attention, of the factorisation and of what is not a product there is none.
`--definition`: loop, passes, scale search and residuals in plain torch instead of kernels.
"""

import argparse
import json
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from peak_memory import MODELS, make_model
from torch import Tensor, nn
from transformers import AutoTokenizer

from dpq_core import pipeline
from dpq_core.calibration import statistics
from dpq_core.data.texts import calibration_windows, load_texts
from dpq_core.kernels import cpu
from dpq_core.layer import hessian, quantize, shared_input
from dpq_core.layer.hessian import InputStatistics
from dpq_core.model.inputs import Batch
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import CalibrationSection, load_recipe
from dpq_core.recipe.scheme import Scheme

RECIPE = Path(__file__).parents[2] / "recipes" / "wiki-llama-12m.yaml"
REST, LAYER = "rest", "layer, rest"
STAGES: dict[str, list[tuple[Any, str]]] = {
    "forward": [(StreamedModel, "forward"), (StreamedModel, "begin")],
    "inputs rounded": [(statistics.InputRounding, "rounded")],
    "magnitudes": [(hessian, "count_magnitudes"), (statistics, "count_magnitudes")],
    "Hessians": [(InputStatistics, "add_hessian"), (InputStatistics, "add")],
    "grid": [(quantize, "choose_grid")],
    "factorisation": [(shared_input, "inverse_factor")],
    "column loop": [(quantize, "quantize_columns")],
    "gradient passes": [(quantize, "refine_codes")],
    "error": [(quantize, "objective")],
    LAYER: [(pipeline, "quantize_or_keep")],
    "saving": [(pipeline, "save_layer"), (pipeline, "write_checkpoint")],
}
OF_LAYERS = ("grid", "factorisation", "column loop", "gradient passes", "error", LAYER)


class Clock:
    """CPU seconds and peak memory by stage, and by layer's shape; the sizes of what was called."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.of_shape: dict[tuple[str, tuple[int, ...]], float] = defaultdict(float)
        self.peaks: dict[str, int] = defaultdict(int)
        self.calls: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
        self._shape: tuple[int, ...] = ()
        self._stack, self._mark = [REST], time.process_time()
        self._idle = psutil.Process().memory_info().rss
        self._over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """All stages timed, and memory watched, while it lasts."""
        with ExitStack() as patches:
            for stage, functions in STAGES.items():
                for owner, name in functions:
                    timed = self._timed(stage, getattr(owner, name))
                    patches.enter_context(patch.object(owner, name, timed))
            watcher = threading.Thread(target=self._watch)
            watcher.start()
            self._mark = time.process_time()
            try:
                yield
            finally:
                self._turn()
                self._over.set()
                watcher.join()

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            self._turn()
            self._stack.append(stage)
            given = [each.hidden if isinstance(each, Batch) else each for each in arguments]
            sizes = [tuple(each.shape) for each in given if isinstance(each, Tensor)]
            self.calls[function.__name__].update(sizes[:1])
            if stage == LAYER:
                self._shape = sizes[0]
            try:
                return function(*arguments, **named)
            finally:
                self._turn()
                self._stack.pop()
                if stage == LAYER:
                    self._shape = ()

        return timed

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._mark
        self.of_shape[self._stack[-1], self._shape] += now - self._mark
        self._mark = now

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._over.wait(0.02):
            above = process.memory_info().rss - self._idle
            self.peaks[self._stack[-1]] = max(self.peaks[self._stack[-1]], above)


def alone(function: Callable[..., Any], *arguments: Any, repeats: int = 5) -> float:
    """CPU seconds of a product: the median of some runs after a first one."""
    function(*arguments)
    times = []
    for _ in range(repeats):
        started = time.process_time()
        function(*arguments)
        times.append(time.process_time() - started)
    return sorted(times)[repeats // 2]


def floors(clock: Clock, scheme: Scheme, blocks: int) -> dict[str, float]:
    """CPU seconds of each stage's products alone.

    Column loop: every later column takes a block's errors. Gradient passes: the gradient, once.
    Error: half of such a product for the residual, half for the weight.
    """
    found: dict[str, float] = defaultdict(float)
    layers = clock.calls["quantize_or_keep"]
    for (rows, features), count in layers.items():
        product = alone(torch.mm, torch.randn(features, features), torch.randn(features, rows))
        found["error"] += count * product
        found["gradient passes"] += count * product * (scheme.rounding == "gradient")
        found["column loop"] += count * trailing(rows, features, scheme.block_columns)
    for (*tokens, features), count in clock.calls["add_hessian"].items():
        x, statistics = torch.randn(*tokens, features).bfloat16(), InputStatistics.empty(features)
        found["Hessians"] += count * alone(statistics.add_hessian, x)
    for (*tokens, _), count in clock.calls["forward"].items():
        for (rows, features), number in layers.items():
            x, weight = torch.randn(*tokens, features), torch.randn(rows, features)
            product = alone(nn.functional.linear, x.bfloat16(), weight.bfloat16())
            found["forward"] += count * number / blocks * product
    return found


def trailing(rows: int, features: int, block: int) -> float:
    weight, factor = torch.randn(features, rows), torch.randn(features, features)

    def products() -> None:
        for start in range(0, features, block):
            stop = start + block
            weight[stop:].addmm_(factor[start:stop, stop:].T, weight[start:stop], alpha=1e-6)

    return alone(products)


def compile_kernels(scheme: Scheme, section: CalibrationSection) -> None:
    """By quantizing a small layer, inputs rounded as the scheme says."""
    x = torch.randn(64, 16).bfloat16()
    found = InputStatistics.empty(16)
    found.add_magnitudes(x)
    rounding = statistics.InputRounding.of(scheme, section)
    scale = rounding.static_scale(found.magnitudes) if rounding else None
    found.add_hessian(*(rounding.rounded(x, scale) if rounding else (x, None)))
    quantize.quantize_layer(torch.randn(16, 16), found, scheme)


def print_stages(clock: Clock, floor: dict[str, float]) -> None:
    total, floor_total = sum(clock.seconds.values()), sum(floor.values())
    print("| stage | CPU s | share | peak, MiB | products alone, s | ratio |")
    print("|---|---|---|---|---|---|")
    for stage in (*STAGES, REST):
        seconds, alone_ = clock.seconds[stage], floor.get(stage)
        products = f"{alone_:.2f} | {seconds / alone_:.2f}" if alone_ else "– | –"
        peak = clock.peaks[stage] / 2**20
        print(f"| {stage} | {seconds:.2f} | {seconds / total:.0%} | {peak:.0f} | {products} |")
    peak = max(clock.peaks.values()) / 2**20
    print(f"| all | {total:.2f} | | {peak:.0f} | {floor_total:.2f} | {total / floor_total:.2f} |")
    print(f"\nshare in matrix products, by the floor: {floor_total / total:.0%}\n")


def print_shapes(clock: Clock) -> None:
    print(f"| layer | number | {' | '.join(OF_LAYERS)} | ms a layer |")
    print(f"|---|---|{'---|' * len(OF_LAYERS)}---|")
    for shape, count in clock.calls["quantize_or_keep"].items():
        each = [1e3 * clock.of_shape[stage, shape] / count for stage in OF_LAYERS]
        cells = " | ".join(f"{value:.1f}" for value in each)
        print(f"| {shape[0]} × {shape[1]} | {count} | {cells} | {sum(each):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE)
    parser.add_argument("--model", choices=MODELS, help="random weights instead of the recipe's")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--definition", action="store_true")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.set)
    given = {"samples": arguments.windows, "sequence_length": arguments.length}
    update = {key: value for key, value in given.items() if value}
    section = recipe.calibration.model_copy(update=update)
    with tempfile.TemporaryDirectory() as work, ExitStack() as patches:
        if arguments.model:
            source = Path(work, "model")
            make_model(source, arguments.model, arguments.blocks)
            shape = section.samples, section.sequence_length
            windows = torch.randint(32000, shape, generator=torch.Generator().manual_seed(0))
        else:
            source = Path(recipe.model.id)
            texts = load_texts(section.dataset)
            tokenizer = AutoTokenizer.from_pretrained(source)
            windows = calibration_windows(
                texts, tokenizer, section.samples, section.sequence_length
            )
        if arguments.definition:
            patches.enter_context(patch.object(cpu, "fits", return_value=False))
        compile_kernels(recipe.scheme, section)
        clock, started = Clock(), time.perf_counter()
        with clock.running():
            pipeline.quantize_checkpoint(
                source, Path(work, "out"), windows, recipe.scheme, section, {}
            )
        wall = time.perf_counter() - started
        blocks = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    tokens = " × ".join(map(str, windows.shape))
    what = f"{arguments.model} (random weights)" if arguments.model else recipe.model.id
    how = "definition" if arguments.definition else "kernels"
    print(f"{what}, {tokens} tokens, {torch.get_num_threads()} threads, {how}: {wall:.1f} s\n")
    print_stages(clock, floors(clock, recipe.scheme, blocks))
    print_shapes(clock)


if __name__ == "__main__":
    main()
