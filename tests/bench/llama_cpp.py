"""Decoding beside llama.cpp: one model, batch 1, the same threads, in turns.

    python tests/bench/llama_cpp.py FOLDER MODEL.gguf [--threads 2] [--prompt 128] [--new 64]
                                    [--rounds 3] [--peers .peers/llama-cpp] [--group-size 64]

`FOLDER` is a 16-bit checkpoint, `MODEL.gguf` the same model for llama.cpp (of any type: what it
holds is requantized to Q4_0 and Q4_K_M). llama.cpp is built from the package index into an
environment of its own at the first run, in minutes; CMAKE_ARGS of the environment count, so that a
processor can be kept to AVX2 there as well (`-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON
-DGGML_F16C=ON`). Weights of ours are rounded to nearest: their values do not change the time.
llama.cpp quantizes embedding and head too, ours keeps them in 16 bits: bytes stand beside.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from dpq_core.benchmark.formats_timed import Checkpoint
from dpq_core.benchmark.throughput import measure
from dpq_core.machine.device import whole_machine
from dpq_core.recipe import BenchmarkSection
from dpq_core.recipe.scheme import Scheme

PACKAGE = "llama-cpp-python==0.3.36"
FORMATS = {"Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
OURS = {"BF16": "bf16", "W4A16": "w4a16", "W4A8": "w4a8"}

# What runs in llama.cpp's environment: its C interface, so that nothing but the model is timed.
QUANTIZE = """
import ctypes, sys, llama_cpp
source, target, kind = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.allow_requantize = getattr(llama_cpp, kind), True
wrong = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
sys.exit(wrong)
"""
DECODE = """
import json, sys, time, llama_cpp
path, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
llama = llama_cpp.Llama(path, n_ctx=prompt + new, n_batch=prompt, n_threads=threads,
                        n_threads_batch=threads, verbose=False, logits_all=False)
tokens = [(7 * n) % (llama.n_vocab() - 100) + 50 for n in range(prompt)]
def run():
    llama.reset()
    begun = time.perf_counter()
    llama.eval(tokens)
    first, token = time.perf_counter(), llama.sample(temp=0.0)
    for _ in range(new - 1):
        llama.eval([token])
        token = llama.sample(temp=0.0)
    return prompt / (first - begun), (new - 1) / (time.perf_counter() - first)
run()
print(json.dumps(run()))
"""


@dataclass(frozen=True)
class Speed:
    """tokens/s."""

    prefill: float
    decode: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--peers", type=Path, default=Path(".peers/llama-cpp"))
    arguments = parser.parse_args()
    python = environment(arguments.peers)
    files = {name: quantized(python, arguments.gguf, kind) for name, kind in FORMATS.items()}
    found: dict[str, list[Speed]] = {name: [] for name in (*OURS, *files)}
    for _ in range(arguments.rounds):
        for name, file in files.items():
            found[name].append(theirs(python, file, arguments))
        for name, speed in ours(arguments).items():
            found[name].append(speed)
    print(
        f"{arguments.threads} threads, {arguments.prompt} prompt and {arguments.new} new tokens\n"
    )
    print("| | prefill, tokens/s | decode, tokens/s | file, MB |\n|---|---|---|---|")
    for name, speeds in found.items():
        prefill = median(speed.prefill for speed in speeds)
        decode = median(speed.decode for speed in speeds)
        size = f"{files[name].stat().st_size / 1e6:.1f}" if name in files else ""
        print(f"| {name} | {prefill:.0f} | {decode:.1f} | {size} |")


def environment(folder: Path) -> Path:
    """The Python of llama.cpp's environment, which is made where it is missing."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.is_file():
        print(f"building {PACKAGE} in {folder} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PACKAGE], check=True)
        ready.touch()
    return python.absolute()


def quantized(python: Path, source: Path, kind: str) -> Path:
    """The model in a format of llama.cpp's, beside the environment."""
    target = python.parents[1] / f"{source.stem}-{kind.rpartition('MOSTLY_')[2]}.gguf"
    if not target.is_file():
        command = [str(python), "-c", QUANTIZE, str(source), str(target), kind]
        subprocess.run(command, check=True, capture_output=True)
    return target


def theirs(python: Path, file: Path, arguments: argparse.Namespace) -> Speed:
    numbers = map(str, (arguments.threads, arguments.prompt, arguments.new))
    command = [str(python), "-c", DECODE, str(file), *numbers]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Speed(*json.loads(done.stdout.splitlines()[-1]))


def ours(arguments: argparse.Namespace) -> dict[str, Speed]:
    asked = BenchmarkSection(
        batches=[1],
        variants=list(OURS.values()),
        prompt_tokens=arguments.prompt,
        new_tokens=arguments.new,
        repeats=1,
    )
    source = Checkpoint(arguments.folder, Scheme(group_size=arguments.group_size), {})
    with whole_machine():
        torch.set_num_threads(arguments.threads)
        cells = measure(source, asked, torch.device("cpu")).cells
    speeds = {}
    for name, variant in OURS.items():
        cell = next(cell for cell in cells if cell.variant == variant)
        assert not cell.wrong, cell.wrong
        prefill, decode = cell.prefill_tokens_per_second, cell.decode_tokens_per_second
        speeds[name] = Speed(prefill or 0, decode or 0)
    return speeds


if __name__ == "__main__":
    main()
