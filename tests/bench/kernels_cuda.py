"""The Hopper runtime beside cuBLAS, `torch._scaled_mm` and gemlite, by CUDA graphs."""

import copy
import statistics
from collections.abc import Callable, Iterator

import torch
from kernel_rows import W4A8, W4A16, W8A8, Row, assert_as_good, random_layer, weight_bytes
from torch import Tensor, nn

from dpq_core.layer.records import QuantizedLinear, QuantizedWeight
from dpq_core.recipe.scheme import Scheme
from dpq_core.serving import hopper

SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (28672, 8192)]  # out, in
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
BASE = "BF16"
CHECKED = [1, 2, 17, 64, 128, 129]
_CACHE = 256 << 20  # bytes of weights that a method goes through; the L2 has 60 MB
_GIGABYTES = 4


def conditions() -> dict[str, object]:
    import triton

    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "processors": device.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_second": _copy_bandwidth(),
        "bf16_operations_per_second": _product_rate(fp8=False),
        "fp8_operations_per_second": _product_rate(fp8=True),
        "weights_rotated_over_bytes": _CACHE,
    }


def rows(
    shapes: list[tuple[int, int]],
    tokens: list[int],
    repeats: int,
    peers: bool,
    limits: dict[str, object],
) -> Iterator[tuple[Row, dict[str, str]]]:
    """A row each, and why a method is not in it. limits: what `conditions` measured."""
    for out, features in shapes:
        methods, missing = _methods(out, features, peers)
        for count in tokens:
            x = torch.randn(count, features, device="cuda", dtype=torch.bfloat16)
            row = Row(out, features, count)
            row.microseconds, failed = _microseconds(methods, x, repeats)
            for name in row.microseconds:
                least = _least_seconds(name, row, limits)
                row.share[name] = 1e6 * least / row.microseconds[name]
            yield row, missing | failed
        del methods
        torch.cuda.empty_cache()


def _methods(
    out: int, features: int, peers: bool
) -> tuple[dict[str, list[nn.Module]], dict[str, str]]:
    """Copies of each method's module; ours are checked first."""
    methods: dict[str, list[nn.Module]] = {}
    layers = {
        name: random_layer(out, features, scheme, "cuda")
        for name, scheme in (("W4A8", W4A8), ("W4A16", W4A16), ("W8A8", W8A8))
    }
    for name, layer in layers.items():
        module = hopper.make(layer, None)
        for tokens in CHECKED:
            x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
            assert_as_good(module, layer, x)
        methods[name] = _copies(module, weight_bytes(out, features, layer.scheme))
    bf16 = nn.Linear(features, out, bias=False, dtype=torch.bfloat16, device="cuda")
    methods[BASE] = _copies(bf16.requires_grad_(False), 2 * out * features)
    product = _Product(methods["W8A8"][0])
    methods["FP8 product"] = _copies(product, out * features)
    missing = {}
    for name in ("W4A8", "W4A16") if peers else ():
        layer = layers[name]
        try:
            methods[f"gemlite {name}"] = _copies(
                _gemlite(layer), weight_bytes(out, features, layer.scheme)
            )
        except Exception as error:  # a peer's: whatever keeps it from running is said
            missing[f"gemlite {name}"] = f"{type(error).__name__}: {error}"
    return methods, missing


class _Product(nn.Module):
    """`torch._scaled_mm` alone: inputs that are already in E4M3, a scale a row."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.given: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.given:
            self.given[len(x)] = hopper._quantized(x, x.shape[1], None, 448.0)
        linear, (x8, scale) = self.linear, self.given[len(x)]
        out = linear.out_features
        return hopper._product(x8, linear.weight8, scale, linear.channel_scale, None, out)


def _gemlite(layer: QuantizedLinear) -> nn.Module:
    """Of the same codes, scales and zero points (s8 folded into the scales), inputs dynamic."""
    from gemlite.helper import A16W4_HQQ_INT, A8W4_HQQ_INT_dynamic

    assert isinstance(layer.weight, QuantizedWeight)
    grid = layer.weight.grid
    scale = (grid.group_scale.float() * grid.channel_scale).reshape(-1, 1)
    zero = grid.zero_point.float().reshape(-1, 1)
    fp8 = layer.scheme.inner == "e4m3"
    maker = A8W4_HQQ_INT_dynamic if fp8 else A16W4_HQQ_INT
    made = maker(device="cuda:0", dtype=torch.bfloat16)
    return made.from_weights(layer.weight.codes, scale.bfloat16(), zero.bfloat16())


def _copies(module: nn.Module, bytes_: int) -> list[nn.Module]:
    return [module, *(copy.deepcopy(module) for _ in range(max(1, _CACHE // bytes_)))]


@torch.inference_mode()
def _microseconds(
    methods: dict[str, list[nn.Module]], x: Tensor, repeats: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Medians of `repeats` replays in turn, of a graph that calls each copy once or more."""
    graphs, failed = {}, {}
    for name, copies in methods.items():
        calls = copies * max(1, 16 // len(copies))
        try:
            graphs[name] = (
                _captured(lambda calls=calls: [module(x) for module in calls]),
                len(calls),
            )
        except Exception as error:
            if not name.startswith("gemlite"):
                raise
            failed[name] = f"{type(error).__name__}: {error}"
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(repeats + 1):
        for name, (graph, calls) in graphs.items():
            microseconds = 1e3 * _milliseconds(graph.replay) / calls
            if turn:
                times[name].append(microseconds)
    return {name: statistics.median(each) for name, each in times.items()}, failed


def _captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # compiles, and a peer's search
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _milliseconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _median_seconds(work: Callable[[], object]) -> float:
    work()
    return statistics.median(_milliseconds(work) for _ in range(11)) / 1e3


def _copy_bandwidth() -> float:
    """Bytes read and written a second."""
    source = torch.empty(_GIGABYTES << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source))


def _product_rate(fp8: bool) -> float:
    """Operations a second of a product of 8192 × 8192, of random numbers."""
    size = 8192
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    if not fp8:
        return 2 * size**3 / _median_seconds(lambda: a @ b)
    a8, scale = hopper._quantized(a, size, None, 448.0)
    b8, _ = hopper._quantized(b, size, None, 448.0)
    return 2 * size**3 / _median_seconds(lambda: hopper._product(a8, b8, scale, scale, None, size))


def _least_seconds(name: str, row: Row, limits: dict[str, object]) -> float:
    """What memory or the tensor cores allow: weight, inputs and outputs once, all products."""
    schemes: dict[str, Scheme] = {"W4A8": W4A8, "W4A16": W4A16, "W8A8": W8A8, "FP8 product": W8A8}
    scheme = schemes.get(name.removeprefix("gemlite "))
    moved = weight_bytes(row.out, row.features, scheme) + 2 * row.tokens * (row.out + row.features)
    kind = "fp8" if scheme is not None and scheme.inner == "e4m3" else "bf16"
    memory = moved / float(limits["copy_bytes_per_second"])
    products = 2 * row.out * row.features * row.tokens
    return max(memory, products / float(limits[f"{kind}_operations_per_second"]))
