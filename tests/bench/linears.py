"""Linears of the runtimes beside BF16 and their peers: checked, then timed.

    python tests/bench/linears.py [--device cpu|cuda] [--repeats N] [--tokens N …]
                                  [--shapes OUTxIN …] [--without-peers] [--json]

Times are microseconds a call: medians, the methods in turn, each through more copies of its weight
than the cache holds. On the GPU calls are replayed by CUDA graphs. "of the limit" is the time that
the weight, the inputs and the outputs take at the copy bandwidth, or the products at the product
rate, whichever is longer, both measured in the same run; by the time taken. W4A8 and W8A8 take BF16
inputs and round them, a scale a token; "FP8 product" is `torch._scaled_mm` alone. On a CPU "W4A8"
is the runtime that is chosen there, and "W4A8, AVX2" the one for AVX2 on any processor. To see
another class of processors: ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY, MKL_ENABLE_INSTRUCTIONS, and
NUMBA_CPU_NAME and NUMBA_CPU_FEATURES for the kernels here.

Needs torch, and Triton for the GPU; nothing else of the project than `dpq_core`.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

import kernels_cpu
import kernels_cuda
from kernel_rows import Row

from dpq_core.serving import hopper

NAMES = {
    "cuda": [
        "BF16", "FP8 product", "W8A8", "W4A16", "W4A8", "gemlite W4A8", "gemlite W4A16",
    ],
    "cpu": ["BF16", "FP32", "torchao INT4", "W4A8, definition", "W4A8, AVX2", "W4A8"],
}  # fmt: skip
BASE = "BF16"


def run(device: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows of one device, printed as they come; as a record for --json."""
    section: Any = kernels_cuda if device == "cuda" else kernels_cpu
    shapes = [_sides(each) for each in arguments.shapes] or section.SHAPES
    found = section.conditions()
    show(f"\n{', '.join(f'{key}: {pretty(value)}' for key, value in found.items())}\n")
    heading = ["out × in", "tokens", *(f"{name} µs" for name in NAMES[device])]
    heading += ["BF16 / W4A8", *(["W8A8 / W4A8", "W4A8 of the limit"] if device == "cuda" else [])]
    show(f"| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
    extra = [found] if device == "cuda" else []
    tokens = arguments.tokens or section.TOKENS
    missing: dict[str, str] = {}
    lines = []
    peers = not arguments.without_peers
    for row, absent in section.rows(shapes, tokens, arguments.repeats, peers, *extra):
        missing |= absent
        lines.append(asdict(row))
        show(as_line(row, device))
    for name, reason in missing.items():
        show(f"\n{name}: {reason}")
    return {"conditions": found, "rows": lines, "missing": missing}


def _sides(shape: str) -> tuple[int, int]:
    out, features = map(int, shape.split("x"))
    return out, features


def as_line(row: Row, device: str) -> str:
    times = [row.microseconds.get(name) for name in NAMES[device]]
    cells = [f"{row.out} × {row.features}", str(row.tokens)]
    cells += ["–" if time is None else f"{time:.1f}" for time in times]
    cells.append(f"{row.ratio('W4A8', BASE):.2f}" if "W4A8" in row.microseconds else "–")
    if device == "cuda":
        cells += [f"{row.ratio('W4A8', 'W8A8'):.2f}", f"{row.share['W4A8']:.0%}"]
    return f"| {' | '.join(cells)} |"


def pretty(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(text: str) -> None:
    print(text, file=SHOWN, flush=True)


SHOWN = sys.stdout


def main() -> None:
    global SHOWN
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: both")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="*")
    parser.add_argument("--shapes", nargs="*", default=[], metavar="OUTxIN")
    parser.add_argument(
        "--without-peers", action="store_true", help="gemlite searches for minutes at each shape"
    )
    parser.add_argument("--json", action="store_true", help="one object on stdout, rows on stderr")
    arguments = parser.parse_args()
    SHOWN = sys.stderr if arguments.json else sys.stdout
    results: dict[str, Any] = {}
    for device in [arguments.device] if arguments.device else ["cuda", "cpu"]:
        reason = hopper.unavailable() if device == "cuda" else ""
        if reason:
            show(f"\ncuda: not measured here: {reason}")
            results[device] = {"missing": {"cuda": f"not measured here: {reason}"}, "rows": []}
        else:
            results[device] = run(device, arguments)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
