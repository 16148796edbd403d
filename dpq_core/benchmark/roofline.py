"""What a device could reach: the bytes that a decoding step must read, over the bandwidth of a
copy, and its products, over the rate of a large one; both rates measured here and now.

    step >= max(bytes / bandwidth, 2 · weights · batch / rate)          (Williams et al., 2009)

Bytes are those of the scheme (codes, scales, zero points), of what stays in 16 bits but the
embedding, of which a step reads a row a sequence, and of the keys and values of the sequences so
far, at their mean length. Arithmetic of attention is left out. The rate is that of a BF16 product:
8-bit units may be faster, and a line drawn by it is no limit for them.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31, "hpu": 1 << 30}  # of a copy: more than any cache holds
_SIDE = {"cpu": 1024, "cuda": 8192, "hpu": 8192}  # of a square product
_REPEATS = 5


@dataclass(frozen=True)
class Device:
    """bandwidth: bytes read and written a second. product_rate: of BF16, operations a second."""

    bandwidth: float
    product_rate: float


@dataclass(frozen=True)
class Load:
    """What decoding one model takes: bytes of weights that a step reads; weights that a token is
    multiplied with; bytes of keys and values that a token of context takes."""

    weight_bytes: int
    weights: int
    context_bytes: int

    def tokens_per_second(self, batch: int, context: float, device: Device) -> float:
        """Most that decoding can reach, `context` tokens a sequence being there already."""
        read = self.weight_bytes + batch * context * self.context_bytes
        products = 2 * self.weights * batch
        return batch / max(read / device.bandwidth, products / device.product_rate)


def measured_device(device: torch.device) -> Device:
    """Both rates, medians of several."""
    return Device(_bandwidth(device), _product_rate(device))


def _bandwidth(device: torch.device) -> float:
    source = torch.ones(_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def _product_rate(device: torch.device) -> float:
    side = _SIDE[device.type]
    factor = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    return 2 * math.pow(side, 3) / seconds(lambda: factor @ factor, device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a run, after one that does not count."""
    taken = []
    for _ in range(1 + _REPEATS):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


def synchronize(device: torch.device) -> None:
    """Wait for what a device was given to do; a CPU does it at once."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
