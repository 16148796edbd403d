"""What becomes of a 4-bit checkpoint of others whose codes are kept (`scheme.method: keep`), by the
product's own pipeline.

    python tests/bench/converted.py MODEL --group-size 64 [--given FOLDER] [--data ../shared/data]
                                    [--samples 48] [--length 512] [--windows 48]

MODEL in 16 bits; FOLDER the W4A16 checkpoint that was made of it: without one our own GPTQ makes
and exports it. Calibrated on C4, scored on windows that are spread over WikiText-2's test split:
perplexity, KL(p4 || p) a token to the given checkpoint in 16-bit arithmetic and its standard error,
KL(p16 || p), the largest error of a layer's output, megabytes, CPU seconds of the
conversion. The last rows quantize MODEL itself by the same scheme.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from in_16_bits import C4, WIKITEXT, parser_of, scored_windows, texts_of
from methods_score import Reference, reference, score_windows
from torch import Tensor

from dpq_core.checkpoint.exports import export_checkpoint, failures
from dpq_core.checkpoint.native import load_model, load_quantized
from dpq_core.data.texts import calibration_windows, opening_token
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme
from tasks.support.model import load_tokenizer

_BATCH = 4
_GPTQ = {"method": "gptq", "inner": "none", "activations": "none", "symmetric": True}
_DYNAMIC = {"symmetric": True, "activations": "dynamic"}
# Name: scheme, and whether the given codes are kept.
_ROWS: dict[str, tuple[dict[str, Any], bool]] = {
    "kept, `ada-vllm`": ({"preset": "ada-vllm", "method": "keep"}, True),
    "kept, E4M3": ({"method": "keep", **_DYNAMIC}, True),
    "kept, E4M3, `mse`": ({"method": "keep", "scale_search": "mse", **_DYNAMIC}, True),
    "kept, E4M3, `hessian`": ({"method": "keep", "scale_search": "hessian", **_DYNAMIC}, True),
    "kept, `hopper-vllm`": ({"preset": "hopper-vllm", "method": "keep"}, True),
    "from 16 bits, `ada-vllm`": ({"preset": "ada-vllm"}, False),
    "from 16 bits, dpq": (_DYNAMIC, False),
}


class Bench:
    """A model's windows, and what is compared with."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, self.group_size = arguments.model, arguments.group_size
        tokenizer = load_tokenizer(self.model)
        opening = opening_token(tokenizer, "auto")
        texts = list(texts_of(arguments.data / C4))
        sizes = {"samples": arguments.samples, "sequence_length": arguments.length}
        self.section = CalibrationSection.model_validate(
            {"dataset": TextDataset(path="none").model_dump(), "batch_size": _BATCH, **sizes}
        )
        self.calibrated = calibration_windows(
            texts, tokenizer, arguments.samples, arguments.length, opening
        )
        texts = list(texts_of(arguments.data / WIKITEXT))
        self.scored: Tensor = scored_windows(texts, tokenizer, opening, arguments.windows)
        self.leading = 1 if opening is None else 2

    def quantized(self, source: Path, out: Path, scheme: dict[str, Any]) -> list[dict[str, Any]]:
        parsed = Scheme.model_validate({**scheme, "group_size": self.group_size})
        made = quantize_checkpoint(source, out, self.calibrated, parsed, self.section, {})
        rows: list[dict[str, Any]] = made["layers"]
        return rows

    def given(self, work: Path) -> Path:
        """A GPTQ checkpoint of the model, of our own making."""
        self.quantized(self.model, work / "gptq-native", _GPTQ)
        (work / "given").mkdir()
        wrong = failures(export_checkpoint(work / "gptq-native", work / "given", "gptq"))
        assert not wrong, wrong
        return work / "given"

    def scores(self, model: Any, old: Reference) -> tuple[float, float, float]:
        """Perplexity, KL a token, its standard error over windows."""
        found = score_windows(model, self.scored, old, self.leading, _BATCH)
        nats = np.array(found.divergence)
        return found.perplexity, float(nats.mean()), float(nats.std(ddof=1) / len(nats) ** 0.5)


def size(folder: Path) -> float:
    """Megabytes of a checkpoint's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    parser = parser_of(__doc__, samples=48, windows=48)
    parser.add_argument("--given", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", nargs="+", default=list(_ROWS))
    arguments = parser.parse_args()
    bench = Bench(arguments)
    print(f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads", flush=True)
    print("| row | perplexity | KL to the given | KL to 16 bits | layer | MB | CPU s |", flush=True)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        given = arguments.given or bench.given(work)
        model = load_model(arguments.model)
        whole = reference(model, bench.scored, _BATCH)
        perplexity = bench.scores(model, whole)[0]
        print(f"| 16 bits | {perplexity:.3f} | | | | {size(arguments.model):.0f} | |", flush=True)
        model = load_model(given, source=True)
        four = reference(model, bench.scored, _BATCH)
        perplexity, away, _ = bench.scores(model, whole)
        print(f"| given, W4A16 | {perplexity:.3f} | | {away:.4f} | | {size(given):.0f} | |")
        del model
        for number, name in enumerate(arguments.rows):
            scheme, kept = _ROWS[name]
            before = sum(os.times()[:2])
            native = work / f"native-{number}"
            rows = bench.quantized(given if kept else arguments.model, native, scheme)
            seconds = sum(os.times()[:2]) - before
            model = load_quantized(native)
            perplexity, near, error = bench.scores(model, four)
            away = bench.scores(model, whole)[1]
            worst = max(row["error"] for row in rows)
            print(
                f"| {name} | {perplexity:.3f} | {near:.4f} ± {error:.4f} | {away:.4f} |"
                f" {worst:.2g} | {size(native):.0f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
