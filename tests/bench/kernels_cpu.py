"""The CPU's linears: the runtime's, the definition, BF16 and FP32, torchao's INT4."""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from kernel_rows import W4A8, Row, assert_as_good, random_layer, rotated, weight_bytes
from torch import Tensor, nn

from dpq_core.kernels import products
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.records import QuantizedLinear
from dpq_core.serving import avx2
from dpq_core.serving.runtimes import runtime_for

SHAPES = [(2048, 2048), (4096, 4096), (4096, 11008), (14336, 4096)]  # out, in
TOKENS = [1, 2, 4, 8, 16, 32, 128, 512]
BASE = "BF16"
_PASS = 0.1  # seconds of one method before the next has its turn


def conditions() -> dict[str, object]:
    return {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "products": products.described(),
        "runtime": runtime_for(torch.device("cpu")).runtime.name,
        "weights_rotated_over_bytes": _cache(),
    }


def rows(
    shapes: list[tuple[int, int]], tokens: list[int], repeats: int, peers: bool
) -> Iterator[tuple[Row, dict[str, str]]]:
    """A row each, and why a method is not in it."""
    for out, features in shapes:
        layer = random_layer(out, features, W4A8, "cpu")
        methods, missing = _methods(layer, peers)
        for count in tokens:
            x = torch.randn(count, features, generator=torch.Generator().manual_seed(1)).bfloat16()
            yield Row(out, features, count, _microseconds(methods, x, repeats)), missing


def _methods(
    layer: QuantizedLinear, peers: bool
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, str]]:
    """Each method with its own weights, more than the cache holds; why one is not there."""
    weight = layer.decoded()
    out, features = weight.shape
    bf16, fp32 = nn.Linear(1, 1, dtype=torch.bfloat16), nn.Linear(1, 1)
    bf16.weight, bf16.bias = nn.Parameter(weight.bfloat16(), False), None
    fp32.weight, fp32.bias = nn.Parameter(weight, False), None
    four = weight_bytes(out, features, W4A8)
    modules = {BASE: (bf16, 2 * weight.numel()), "FP32": (fp32, 4 * weight.numel())}
    modules["W4A8, definition"] = (W4A8Linear(layer, None), 2 * weight.numel())
    missing = {}
    runtimes = {"W4A8": _runtime, "W4A8, AVX2": _avx2}
    for name, make in {**runtimes, **({"torchao INT4": _torchao} if peers else {})}.items():
        try:
            modules[name] = (make(layer), four)
        except (ImportError, RuntimeError, AttributeError) as error:
            missing[name] = f"not available: {error}"
    for name in runtimes.keys() & modules.keys():
        for tokens in (1, 33):
            generator = torch.Generator().manual_seed(2)
            x = torch.randn(tokens, features, generator=generator).bfloat16()
            assert_as_good(modules[name][0], layer, x)
    turning = {name: rotated(module, size, _cache()) for name, (module, size) in modules.items()}
    return {name: lambda x, turn=turn: next(turn)(x) for name, turn in turning.items()}, missing


def _runtime(layer: QuantizedLinear) -> nn.Module:
    return runtime_for(torch.device("cpu"))(layer, None)


def _avx2(layer: QuantizedLinear) -> nn.Module:
    if reason := avx2.unavailable():
        raise RuntimeError(reason)
    return avx2.make(layer, None)


def _torchao(layer: QuantizedLinear) -> nn.Module:
    """Its tinygemm path (`_weight_int4pack_mm_for_cpu`), inputs in BF16."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    linear = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(layer.decoded().bfloat16(), False)
    quantize_(linear, PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False))
    linear(torch.zeros(1, layer.features, dtype=torch.bfloat16))
    return linear


@torch.inference_mode()
def _microseconds(
    methods: dict[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int
) -> dict[str, float]:
    """Medians of `repeats` turns; the first turn is not counted."""
    turns: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeats + 1):
        for name, call in methods.items():
            given = x.float() if name == "FP32" else x
            calls, started = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < _PASS or not calls:
                call(given)
                calls += 1
            if turn:
                turns[name].append(1e6 * elapsed / calls)
    return {name: statistics.median(times) for name, times in turns.items()}


def _cache() -> int:
    """Bytes of weights that a method goes through: one and a half times the last cache, which the
    kernel gives in KiB, but half a gigabyte at most."""
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    kibibytes = int(file.read_text().removesuffix("K\n")) if file.exists() else 32 << 10
    return min(3 * kibibytes << 9, 512 << 20)
