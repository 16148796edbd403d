"""A Llama of random weights from calibration to its perplexity, in plain Python, on one device.

    python tests/bench/whole_model.py [--device cuda|cpu] [--shape NAME] [--blocks N]
                                      [--windows N] [--length N]

Writes the checkpoint (to memory, where /dev/shm has room), quantizes it with the default scheme,
loads both for evaluation, scores them. Times say what a model of this shape takes; of `--blocks`
blocks they are also shown for all of the shape's. Values say nothing: the weights are random.
"""

import argparse
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peak_memory import write_shards
from transformers import LlamaConfig

from dpq_core import pipeline
from dpq_core.benchmark.formats_timed import SHAPES
from dpq_core.checkpoint.native import load_model
from dpq_core.evaluation.perplexity import perplexity_token
from dpq_core.model.streaming import empty_model
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SCORED = 8  # windows
STAGES = ("calibrate_block", "quantize_or_keep", "save_layer", "write_checkpoint")


def make_model(folder: Path, sides: dict[str, Any], device: torch.device) -> int:
    """Random weights, a shard a block; returns the checkpoint's bytes."""
    folder.mkdir(parents=True)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
        **sides,
    ).save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, empty in empty_model(folder).named_parameters():
        shard = ".".join(name.split(".")[:3]) if ".layers." in name else name
        made = torch.ones(empty.shape, dtype=torch.bfloat16, device=device)
        if empty.ndim > 1:
            made.normal_(0, 0.02, generator=generator)
        shards[shard][name] = made.cpu()
    return write_shards(folder, shards)


class Clock:
    """Seconds by name, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - started

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def watching(self, owner: Any, names: tuple[str, ...]) -> Iterator[None]:
        """Functions of a module timed while it lasts."""
        with ExitStack() as patches:
            for name in names:
                patches.enter_context(patch.object(owner, name, self._timed(owner, name)))
            yield

    def _timed(self, owner: Any, name: str) -> Any:
        function = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            with self.of(name):
                return function(*given, **named)

        return timed


def measure(work: Path, sides: dict[str, Any], arguments: argparse.Namespace) -> Clock:
    device = torch.device(arguments.device)
    clock = Clock(device)
    with clock.of("random checkpoint, written"):
        written = make_model(work / "model", sides, device)
    shape = arguments.windows, arguments.length
    tokens = torch.randint(sides["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    section = CalibrationSection(
        dataset=TextDataset(path="none"),
        samples=arguments.windows,
        sequence_length=arguments.length,
        batch_size=arguments.batch,
    )
    with clock.of("all of quantizing"), clock.watching(pipeline, STAGES):
        pipeline.quantize_checkpoint(
            work / "model", work / "out", tokens, Scheme(), section, {}, device=device
        )
    show(clock, arguments, sides)
    stored = sum(file.stat().st_size for file in (work / "out").glob("*.safetensors"))
    print(f"checkpoint {written / 1e9:.2f} GB, quantized {stored / 1e9:.2f} GB")
    for folder in ("model", "out"):
        with clock.of(f"load: {folder}"):
            model = load_model(work / folder, device)
        with clock.of(f"perplexity, {SCORED} windows: {folder}"):
            value = perplexity_token(model, tokens[:SCORED], 1).value
        print(f"{folder}: perplexity of random tokens {value:.4g}")
        del model
    return clock


def show(clock: Clock, arguments: argparse.Namespace, sides: dict[str, Any]) -> None:
    """What was timed so far, also as it would be with all blocks of the shape."""
    blocks, tokens = sides["num_hidden_layers"], arguments.windows * arguments.length
    print(f"\n{blocks} of {arguments.of_all} blocks, {tokens:,} tokens\n")
    print(f"| | s | s for {arguments.of_all} blocks |\n|---|---|---|")
    for name, seconds in clock.seconds.items():
        print(f"| {name} | {seconds:.1f} | {seconds * arguments.of_all / blocks:.0f} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="llama-3-8b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    sides = dict(TINY if arguments.shape == "tiny" else SHAPES[arguments.shape])
    arguments.of_all = sides["num_hidden_layers"]
    sides["num_hidden_layers"] = min(arguments.of_all, arguments.blocks or arguments.of_all)
    memory = Path("/dev/shm")
    needed = 3 << 30 if arguments.shape != "tiny" else 0
    place = memory if memory.is_dir() and shutil.disk_usage(memory).free > 8 * needed else None
    with tempfile.TemporaryDirectory(dir=place) as work:
        clock = measure(Path(work), sides, arguments)
    show(clock, arguments, sides)
    if arguments.device == "cuda":
        print(f"\nmost GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
