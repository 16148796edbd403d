"""What an FP8 KV cache costs on a real model, beside the same weights with a cache in 16 bits.

    python tests/bench/kv_cache.py MODEL [--data ../shared/data] [--samples 16] [--length 512]
                                      [--windows 12] [--scored 512] [--weights 16 w8a16 w4a8]
                                      [--faults -2 -1 1 8]

By the product's own pipeline: calibrated on C4, scored as a whole model whose attention rounds. A
row is weights and a cache: `none`, a scale a `layer` or a `head`, or, to see what powers of two
cost, a layer's largest magnitude over 448 (`layer, exact`); `off by 2^n` has all scales wrong, and
`truncated` is what vLLM's kernel for CPUs does in place of rounding.
Scored on windows of WikiText-2's test split as by `in_16_bits.py`: the increase of perplexity,
KL(p16 || p) a token, that less the same weights' without, window by window, with its standard
error. Bytes are of the keys and values of a token.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from in_16_bits import Differences, In16Bits, parser_of, with_error
from methods_score import WindowScores
from torch import Tensor

from dpq_core.checkpoint.exports.card import cache_bytes
from dpq_core.checkpoint.native import load_quantized
from dpq_core.layer import kv_cache
from dpq_core.model import kv_cache as hooks
from dpq_core.model.streaming import load_config
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme
from dpq_core.serving.decoding import context_bytes

WEIGHTS: dict[str, dict[str, Any]] = {
    "16": {"method": "none", "inner": "none", "activations": "none"},
    "w8a16": {"method": "rtn", "bits": 8, "inner": "int8", "activations": "none"},
    "w4a8": {},
}
CACHES: dict[str, dict[str, Any]] = {
    "none": {},
    "layer": {"kv_cache": "fp8"},
    "layer, exact": {"kv_cache": "fp8"},
    "head": {"kv_cache": "fp8", "kv_cache_scale": "head"},
}
TRIED = {"16": ("layer", "layer, exact", "head")}  # without a cache these are the model itself
FAULTS = [-2, -1, 1, 8]  # powers of two


def truncated(x: Tensor, scale: Tensor) -> Tensor:
    """`as_kept` of a kernel that goes to the next number towards zero, as vLLM's for CPUs does."""
    units = (x.float() / scale.float()).clamp(-448, 448)
    codes = units.to(torch.float8_e4m3fn)
    beyond = codes.float().abs() > units.abs()
    codes = (codes.view(torch.uint8) - beyond.to(torch.uint8)).view(torch.float8_e4m3fn)
    return (codes.float() * scale.float()).to(x.dtype)


class Bench:
    """A model, its windows, and what it says of them in 16 bits."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder, sizes = arguments.model, (arguments.samples, arguments.length)
        about = arguments.data, arguments.windows, arguments.batch, arguments.scored
        self.original = In16Bits(self.folder, *about)
        self.calibrated = self.original.calibrated(*sizes)
        self.section = CalibrationSection(
            dataset=TextDataset(path="none"), samples=sizes[0], sequence_length=sizes[1]
        )

    def made(self, weights: str, cache: str, out: Path) -> dict[str, Any]:
        """A checkpoint; its manifest."""
        scheme = Scheme.model_validate(WEIGHTS[weights] | CACHES[cache])
        exact = patch.object(kv_cache, "power_of_two_above", lambda scale: scale)
        about = self.folder, out, self.calibrated, scheme, self.section, {}
        if "exact" not in cache:
            return quantize_checkpoint(*about)
        with exact:
            return quantize_checkpoint(*about)


def off(model: Any, power: int) -> Any:
    """With all scales of its cache wrong."""
    for name, buffer in model.named_buffers():
        if name.endswith((".k_scale", ".v_scale")):
            buffer.mul_(2.0**power)
    return model


class Rows:
    """A table that grows by a row at a time. Differences are to the first row, or to 16 bits."""

    def __init__(self, base: WindowScores, weights: str, bytes_16: int) -> None:
        self._base, self._weights, self._bytes = base, weights, bytes_16
        self._differences = Differences(np.zeros(len(base.nats)) if weights in TRIED else None)

    def add(self, cache: str, found: WindowScores, taken: int | None) -> None:
        print(
            f"| {self._weights} | {cache} | {taken or self._bytes:,} |"
            f" {found.perplexity - self._base.perplexity:+.4f} | {np.mean(found.divergence):.5f} |"
            f" {with_error(self._differences.of(found), '+.5f')} |",
            flush=True,
        )


def main() -> None:
    parser = parser_of(__doc__, samples=16, windows=12)
    parser.add_argument("--scored", type=int, default=512, help="tokens of a scored window")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS))
    parser.add_argument("--faults", nargs="*", type=int, default=FAULTS, metavar="POWER")
    arguments = parser.parse_args()
    bench, sixteen = Bench(arguments), context_bytes(load_config(arguments.model))
    print("| weights | cache | bytes a token | increase | KL | less without |", flush=True)
    print("|---|---|--:|--:|--:|--:|")
    for weights in arguments.weights:
        rows = Rows(bench.original.scores, weights, sixteen)
        for cache in TRIED.get(weights, ("none", "layer")):
            with tempfile.TemporaryDirectory() as work:
                out = Path(work, "out")
                taken = cache_bytes(bench.made(weights, cache, out))
                rows.add(cache, bench.original.scored(load_quantized(out)), taken)
                for power in arguments.faults if (weights, cache) == ("16", "layer") else ():
                    found = bench.original.scored(off(load_quantized(out), power))
                    rows.add(f"off by 2^{power}", found, taken)
                if cache == "layer":
                    with patch.object(hooks, "as_kept", truncated):
                        found = bench.original.scored(load_quantized(out))
                    rows.add("layer, truncated", found, taken)


if __name__ == "__main__":
    main()
