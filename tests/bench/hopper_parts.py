"""What the parts of a Hopper linear take, and how exact the library's FP8 product is.

    python tests/bench/hopper_parts.py

Microseconds a call by CUDA graphs, as in `linears.py`, through weights that no cache holds: inputs
rounded with several numbers of values a thread, `multiply` alone (inputs rounded before), decoding
to FP8 for many tokens, the library's product. Then errors of `torch._scaled_mm` against
float64, of the same E4M3 operands: the worst token's, in units of what rounding the exact result to
BF16 gives.
"""

import statistics
from collections.abc import Callable
from unittest.mock import patch

import torch
from kernel_rows import W4A8, random_layer
from kernels_cuda import _captured, _copies, _milliseconds

from dpq_core.serving import hopper

TOKENS = (1, 16, 2048)
SHAPES = ((4096, 14336), (8192, 8192))


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Median of a call's, of a graph of all of them, twice each."""
    graph = _captured(lambda: [call() for call in calls * 2])
    times = [1e3 * _milliseconds(graph.replay) / (2 * len(calls)) for _ in range(7)]
    return statistics.median(times)


@torch.inference_mode()
def rounding() -> None:
    """Of BF16 inputs to E4M3, a scale a token."""
    print("| tokens × columns | values a thread | µs | GB/s |\n|---|---|---|---|")
    for tokens in TOKENS:
        for features in (4096, 14336):
            inputs = [
                torch.randn(tokens, features, device="cuda").bfloat16()
                for _ in range(16 if tokens > 128 else 4)
            ]
            for values in (16, 32, 64, 128):
                names = ("_FEW_A_THREAD", "_MANY_A_THREAD")
                with patch.multiple(hopper, **dict.fromkeys(names, values)):
                    taken = microseconds(
                        [
                            lambda x=x, n=features: hopper._quantized(x, n, None, 448.0)
                            for x in inputs
                        ]
                    )
                moved = 3 * tokens * features / taken / 1e3
                print(
                    f"| {tokens} × {features} | {values} | {taken:.1f} | {moved:.0f} |", flush=True
                )


@torch.inference_mode()
def products() -> None:
    """`multiply` alone, and the way of many tokens in its parts."""
    print("\n| out × in | tokens | part | µs |\n|---|---|---|---|")
    for out, features in SHAPES:
        layer = random_layer(out, features, W4A8, "cuda")
        modules = _copies(hopper.make(layer, None), out * features // 2)
        for tokens in (1, 16, 64):
            x = torch.randn(tokens, features, device="cuda").bfloat16()
            whole = microseconds([lambda m=m, x=x: m(x) for m in modules])
            given = hopper._quantized(x, features, None, 448.0)
            with patch.object(hopper, "_quantized", return_value=given):
                alone = microseconds([lambda m=m, x=x: m(x) for m in modules])
            with patch.object(hopper, "_early", return_value={}):
                waiting = microseconds([lambda m=m, x=x: m(x) for m in modules])
            for name, taken in (
                ("whole", whole),
                ("multiply alone", alone),
                ("whole, each kernel after the other", waiting),
            ):
                print(f"| {out} × {features} | {tokens} | {name} | {taken:.1f} |", flush=True)
        x = torch.randn(2048, features, device="cuda").bfloat16()
        x8, scale = hopper._quantized(x, features, None, 448.0)
        whole = microseconds([lambda m=m, x=x: m(x) for m in modules])
        with patch.object(hopper, "_quantized", return_value=(x8, scale)):
            rounded = microseconds([lambda m=m, x=x: m(x) for m in modules])
            with patch.object(hopper, "_product", side_effect=lambda x8, *_: x8[:, :2].bfloat16()):
                decoding = microseconds([lambda m=m, x=x: m(x) for m in modules])
        for name, taken in (
            ("whole", whole),
            ("inputs rounded before", rounded),
            ("decoding alone", decoding),
        ):
            print(f"| {out} × {features} | 2048 | {name} | {taken:.1f} |", flush=True)
        del modules
        torch.cuda.empty_cache()


@torch.inference_mode()
def exactness() -> None:
    """Of the library's product, with and without fast sums."""
    print("\n| out × in, tokens | scales | fast sums | worst token's error / BF16's | µs |")
    print("|---|---|---|---|---|")
    for out, features, tokens in ((208, 608, 130), (48, 328, 4096), (4096, 4096, 2048)):
        features = -(-features // 16) * 16
        x8, w8 = (
            (torch.randn(n, features, device="cuda") * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
            for n in (tokens, out)
        )
        exact = x8.double() @ w8.double().T
        least = (exact.bfloat16().double() - exact).abs().amax(1)
        one = torch.ones((), device="cuda")
        rows = torch.ones(tokens, 1, device="cuda"), torch.ones(1, out, device="cuda")
        for name, scales in (("rows", rows), ("one", (one, one))):
            for fast in (False, True):

                def product(scales=scales, fast=fast, x8=x8, w8=w8) -> torch.Tensor:
                    return torch._scaled_mm(
                        x8, w8.t(), scale_a=scales[0], scale_b=scales[1],
                        out_dtype=torch.bfloat16, use_fast_accum=fast,
                    )  # fmt: skip

                error = ((product().double() - exact).abs().amax(1) / least).max().item()
                taken = microseconds([product])
                what = f"{out} × {features}, {tokens} | {name} | {fast}"
                print(f"| {what} | {error:.2f} | {taken:.1f} |", flush=True)


def main() -> None:
    exactness()
    products()
    rounding()


if __name__ == "__main__":
    main()
