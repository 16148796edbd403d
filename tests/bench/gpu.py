"""Everything that wants a Hopper GPU, in one go, in order of value: a lease may be cut short.

    python tests/bench/gpu.py [--device cuda|cpu] [--quick] [--only PART ...] [--out FOLDER]
                              [--model FOLDER --prepared FOLDER]

Each part is a process with a time limit of its own; what it prints is kept in FOLDER/PART.log as it
comes, and FOLDER/log.md grows into the section for docs/log.md. A part that fails or runs out of
time leaves the others alone; the exit code is 1 then.

Nothing is installed. A machine for GPU work has torch, Triton, transformers, numba, scipy, pytest,
safetensors, accelerate; what else `dpq_core` needs travels as wheels: `tests/bench/gpu_folder.py`
makes the folder and prints the call. `--device cpu --quick` is the dress rehearsal: the same parts,
kernels in Triton's interpreter, small shapes.
"""

import argparse
import datetime
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).parent
ROOT = BENCH.parents[1]


PATIENCE = 4  # of the rehearsal, on a slow machine


@dataclass(frozen=True)
class Part:
    """A row: what it shows, its command on a GPU and in the rehearsal, seconds that it may take.
    `{model}` and `{prepared}` are the arguments'; `{out}` is the folder of results."""

    name: str
    title: str
    command: str
    quick: str
    seconds: int
    needs_model: bool = False


_CASES = (
    "-m pytest --noconftest -p no:cacheprovider -q --tb=short tests/core/serving/hopper_cases.py"
    " tests/core/kernels/cuda_cases.py tests/core/evaluation/scorer_cases.py"
)
PARTS = (
    Part(
        "checks",
        "Kernels against their definitions",
        f"{_CASES} -n 12",
        f"{_CASES} -k 'test_w4a8_is_as_good_as_the_definition and 128 or magnitudes'",
        100,
    ),
    Part(
        "linears",
        "Linears",
        "tests/bench/linears.py --device cuda --repeats 5 --without-peers --tokens 1 16 64 2048"
        " --shapes 4096x14336 8192x8192 28672x8192",
        "tests/bench/linears.py --device cpu --repeats 1 --without-peers --tokens 1"
        " --shapes 2048x2048",
        75,
    ),
    Part(
        "parts",
        "Parts of a linear",
        "tests/bench/hopper_parts.py",
        "-c pass",
        45,
    ),
    Part(
        "stages",
        "Quantizing, stage by stage",
        "tests/bench/quantize_stages.py --device cuda",
        "tests/bench/quantize_stages.py --device cpu --tokens 512 --shapes 64x64 160x96",
        75,
    ),
    Part(
        "model",
        "A model of the sides of Llama-3-8B, random weights",
        "tests/bench/whole_model.py --device cuda --shape llama-3-8b --blocks 4",
        "tests/bench/whole_model.py --device cpu --shape tiny --windows 16 --length 64",
        90,
    ),
    Part(
        "decode",
        "Prefill and decoding",
        "tests/bench/end_to_end.py --device cuda --shape llama-3-8b --set batches=1,16"
        " prompt_tokens=512 new_tokens=32 --json {out}/decode.json",
        "tests/bench/end_to_end.py --device cpu --shape llama-160m --set batches=1"
        " prompt_tokens=8 new_tokens=2 repeats=1 --json {out}/decode.json",
        90,
    ),
    Part(
        "methods",
        "Methods on a real model",
        "tests/bench/methods_table.py run {model} {prepared} --device cuda --workers 3"
        " --seconds 150 --out {out}/methods.jsonl",
        "tests/bench/methods_table.py run {model} {prepared} --device cpu --quick"
        " --out {out}/methods.jsonl",
        200,
        needs_model=True,
    ),
    Part(
        "peers",
        "Linears beside gemlite's",
        "tests/bench/linears.py --device cuda --repeats 5 --tokens 1 16 --shapes 4096x14336",
        "tests/bench/linears.py --device cpu --repeats 1 --tokens 1 --shapes 2048x2048",
        60,
    ),
)


def run(part: Part, arguments: argparse.Namespace) -> tuple[int, float]:
    """Exit code, 124 where time ran out, and seconds. Output goes to the screen and to the log."""
    command = part.quick if arguments.quick else part.command
    command = command.format(
        model=arguments.model, prepared=arguments.prepared, out=arguments.out.resolve()
    )
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    if arguments.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    started = time.monotonic()
    with (arguments.out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            f"exec {sys.executable} {command}",
            shell=True,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(part.seconds * (PATIENCE if arguments.quick else 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = 124
    return code, time.monotonic() - started


def section(part: Part, code: int, seconds: float, log: Path) -> str:
    """A part's paragraphs for docs/log.md."""
    said = {0: "", 124: ", out of time"}.get(code, f", exit code {code}")
    return f"### {part.title} ({seconds:.0f} s{said})\n\n{log.read_text().strip()}\n"


def machine(device: str) -> str:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{name}, torch {torch.__version__}, Python {python}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="the rehearsal's sizes")
    parser.add_argument("--only", nargs="*", choices=[part.name for part in PARTS])
    parser.add_argument("--skip", nargs="*", default=[], choices=[part.name for part in PARTS])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--model", type=Path, help="checkpoint of a real model")
    parser.add_argument("--prepared", type=Path, help="its texts, by methods_table.py prepare")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).date()
    report = arguments.out / "log.md"
    report.write_text(f"## {today}, {machine(arguments.device)}\n")
    failed = []
    for part in PARTS:
        chosen = part.name in (arguments.only or [part.name]) and part.name not in arguments.skip
        if not chosen or (part.needs_model and not arguments.model):
            continue
        code, seconds = run(part, arguments)
        text = section(part, code, seconds, arguments.out / f"{part.name}.log")
        print(f"\n{text[:4000]}", flush=True)
        with report.open("a") as file:
            file.write(f"\n{text}")
        failed += [part.name] if code else []
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
