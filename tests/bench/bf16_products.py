"""Linears of BF16 operands on this CPU, by each way that multiplies them here.

    python tests/bench/bf16_products.py [--shapes OUTxIN …] [--tokens N …] [--repeats N]

`torch` is its BF16 linear (oneDNN), whose sums are rounded to BF16 at once: the baseline of a
release. The others are `dpq_core.kernels.forward_rows`, with FP32 sums and E4M3 inputs rounded by a
scale, as a candidate's linears have: by MKL's product, in panels where the processor has
AVX512_BF16, as FP32. Microseconds of a call, the least of some rounds in which all have their turn:
CPU time on one thread, which other work on the machine disturbs least, then wall time on all.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

# OpenMP's threads wait for one another in a busy loop: beside other work 20 times as long as alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch
from torch import Tensor
from torch.nn import functional

from dpq_core.arithmetic.formats import FORMATS
from dpq_core.kernels import forward_rows, products
from dpq_core.kernels.blas import bf16_product, sgemm
from dpq_core.machine.device import whole_machine

SHAPES = ["256x256", "640x256", "256x640", "192x576", "576x576", "1536x576", "576x1536",
          "2048x2048"]  # fmt: skip
TOKENS = [1, 16, 64, 256, 1024]
WAYS = {"MKL": (True, False), "panels": (True, True), "FP32": (False, False)}
_PASS = 0.02  # seconds of one way before the next has its turn


@contextmanager
def going(way: str) -> Iterator[None]:
    units, panels = WAYS[way]
    with (
        mock.patch.object(products, "bf16_units", return_value=units),
        mock.patch.object(products, "in_panels", return_value=panels),
    ):
        yield


def microseconds(
    weight: Tensor, x: Tensor, clock: Callable[[], float], repeats: int
) -> dict[str, float]:
    """The least time of a call, by each way."""
    scale = (x.abs().amax() / 448).float()
    there = {"MKL": bf16_product is not None, "panels": products.by_vectors(), "FP32": sgemm}
    best = {name: float("inf") for name in ("torch", *(way for way in WAYS if there[way]))}

    def as_candidate() -> Tensor:
        return forward_rows.forward(x, weight, None, None, scale, FORMATS["e4m3"])

    def as_baseline() -> Tensor:
        return functional.linear(x, weight)

    for _ in range(repeats):
        for name in best:
            multiply = as_baseline if name == "torch" else as_candidate
            with nullcontext() if name == "torch" else going(name):
                multiply()
                started, before, calls = time.perf_counter(), clock(), 0
                while time.perf_counter() - started < _PASS:
                    multiply()
                    calls += 1
                best[name] = min(best[name], 1e6 * (clock() - before) / calls)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(products.described())
    with whole_machine():
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(threads)
            clock = time.process_time if threads == 1 else time.perf_counter
            print(f"\n{threads} threads, {'CPU' if threads == 1 else 'wall'} µs")
            for shape in arguments.shapes:
                out, features = map(int, shape.split("x"))
                weight = torch.randn(out, features).bfloat16()
                for tokens in arguments.tokens:
                    x = torch.randn(tokens, features).bfloat16()
                    took = microseconds(weight, x, clock, arguments.repeats)
                    cells = (f"{name} {time:.0f} ({time / took['torch']:.2f})"
                             for name, time in took.items())  # fmt: skip
                    print(f"{shape:>10} {tokens:5}  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
