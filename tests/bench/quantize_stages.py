"""What quantizing one layer takes, stage by stage, at the sides of Llama's layers, beside the least
that its products take.

    python tests/bench/quantize_stages.py [--device cuda|cpu] [--tokens N] [--shapes OUTxIN ...]

A row a stage: milliseconds (median of three after a first one), and the products alone at the rates
measured in the same run, of BF16 for the Hessian, of FP32 for everything else. The Hessian is of
`--tokens` tokens of random inputs; `of 262,144` is its time for 128 windows of 2,048. Weights are
random: time does not ask. Then the Hessian by BF16 operands against FP32 products and float64.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dpq_core.kernels.definitions import MAGNITUDES
from dpq_core.kernels.dispatch import count_magnitudes, residual
from dpq_core.layer.column_loop import inverse_factor, quantize_columns
from dpq_core.layer.column_order import column_order
from dpq_core.layer.gradient_rounding import refine_codes
from dpq_core.layer.grid import choose_grid
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.objective import objective
from dpq_core.layer.quantize import quantize_layer
from dpq_core.recipe.scheme import Scheme

SHAPES = (  # out × in, of Llama-3-8B and Llama-3-70B
    "4096x4096",
    "14336x4096",
    "4096x14336",
    "8192x8192",
    "28672x8192",
    "8192x28672",
)
CALIBRATION = 128 * 2048
REPEATS = 3


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Median, the device's work included."""
    times = []
    for _ in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def rates(device: torch.device) -> dict[str, float]:
    """Operations a second of products of random numbers."""
    size = 8192 if device.type == "cuda" else 512
    found = {}
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = torch.randn(2, size, size, device=device, dtype=kind)
        found[name] = 2e3 * size**3 / milliseconds(lambda a=a, b=b: a @ b, device)
    return found


def stages(
    out: int, features: int, tokens: int, device: torch.device, scheme: Scheme
) -> dict[str, tuple[float, float, str]]:
    """Stage → milliseconds, operations of its products, and of which rate."""
    x = inputs(tokens, features, device)
    counted = InputStatistics.empty(features, device)
    counted.add_hessian(x)
    counted.add_magnitudes(x)
    hessian = counted.hessian()
    weight = torch.randn(out, features, device=device) / 50
    order = column_order(hessian.diagonal(), scheme.order, scheme.group_size)
    grid = choose_grid(weight, scheme, hessian.diagonal())
    columns = grid.at(order)
    sorted_hessian = hessian[order][:, order].contiguous()
    turned = weight.T[order].contiguous()
    factor, _ = inverse_factor(sorted_hessian, scheme.damp_frac)
    codes = quantize_columns(turned.clone(), columns, factor, scheme.block_columns)
    rest = residual(codes, turned, columns) if turned.is_cuda else None
    square, product = 2.0 * features**2, 2.0 * features**2 * out
    again = InputStatistics.empty(features, device)
    searched = scheme.model_copy(update={"scale_search": "hessian"})

    def passes() -> int:
        return refine_codes(codes.clone(), turned, columns, sorted_hessian, scheme.block_columns, 1)

    todo: dict[str, tuple[Callable[[], object], float, str]] = {
        "Hessian": (lambda: again.add_hessian(x), square * tokens, "bf16"),
        "magnitudes": (lambda: count_magnitudes(x), 0, "fp32"),
        "magnitudes, bincount": (lambda: bincount(x), 0, "fp32"),
        "grid, minmax": (lambda: choose_grid(weight, scheme, None), 0, "fp32"),
        "grid, Hessian search": (
            lambda: choose_grid(weight, searched, hessian.diagonal()),
            0,
            "fp32",
        ),
        "factorisation": (
            lambda: inverse_factor(sorted_hessian, scheme.damp_frac),
            square * features / 3,
            "fp32",
        ),
        "column loop": (
            lambda: quantize_columns(turned.clone(), columns, factor, scheme.block_columns),
            product / 2,
            "fp32",
        ),
        "one gradient pass": (passes, 1.5 * product, "fp32"),
        "objective": (
            lambda: objective(turned if rest is None else rest, hessian),
            product / 2,
            "fp32",
        ),
        "the whole layer": (lambda: quantize_layer(weight, counted, scheme), 0, "fp32"),
    }
    found = {}
    for name, (work, operations, kind) in todo.items():
        found[name] = (milliseconds(work, device), operations, kind)
    return found


def inputs(tokens: int, features: int, device: torch.device) -> Tensor:
    """Correlated, of unequal sizes, a few large: as hidden states are."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, features, generator=generator, device=device)
    common = torch.randn(tokens, 8, generator=generator, device=device)
    x += common @ torch.randn(8, features, generator=generator, device=device)
    sizes = torch.rand(features, generator=generator, device=device).mul(2).exp()
    return (x * sizes).bfloat16()


def bincount(x: Tensor) -> Tensor:
    """Torch's way, for comparison."""
    bits = x.view(torch.int16).flatten().int() & (MAGNITUDES - 1)
    return torch.bincount(bits, minlength=MAGNITUDES)


def precision(tokens: int, features: int, device: torch.device) -> str:
    """Of the Hessian: relative to float64, by BF16 operands, by their split, by FP32 products."""
    x = inputs(tokens, features, device)
    wide = x.float() * 0.37  # what a token's own scale makes of it
    lines = []
    for name, value in (("BF16 inputs", x), ("FP32 inputs", wide)):
        exact = 2 * value.double().T @ value.double()
        counted = InputStatistics.empty(features, device)
        counted.add_hessian(value)
        plain = 2 * value.float().T @ value.float()
        ours, theirs = (
            float((each.double() - exact).norm() / exact.norm())
            for each in (counted.hessian_sum, plain)
        )
        lines.append(f"{name}: {ours:.1e} (FP32 products {theirs:.1e})")
    return "; ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="OUTxIN")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rate = rates(device)
    print(f"products: BF16 {rate['bf16'] / 1e12:.4g}, FP32 {rate['fp32'] / 1e12:.4g} TFLOP/s")
    print(f"Hessian of 8,192 × 1,024 against float64: {precision(8192, 1024, device)}\n")
    scheme = Scheme()
    print(
        "| out × in | stage | ms | products alone, ms | ratio |\n|---|---|---|---|---|", flush=True
    )
    for shape in arguments.shapes:
        out, features = map(int, shape.split("x"))
        found = stages(out, features, arguments.tokens, device, scheme)
        for name, (taken, operations, kind) in found.items():
            least = 1e3 * operations / rate[kind]
            beside = f"{least:.2f} | {taken / least:.2f}" if least else "– | –"
            print(f"| {out} × {features} | {name} | {taken:.2f} | {beside} |", flush=True)
        whole = found["Hessian"][0] * CALIBRATION / arguments.tokens
        print(f"| {out} × {features} | Hessian of {CALIBRATION:,} | {whole:.1f} | – | – |")
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
