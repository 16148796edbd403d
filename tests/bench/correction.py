"""What `calibration.propagation: groups` and `calibration.correction` do to a real model, by the
product's own pipeline.

    python tests/bench/correction.py MODEL [--data ../shared/data] [--samples 16] [--length 512]
                                           [--windows 12] [--rows original groups 0.25 0.5 1]

Calibrated on C4, scored on windows that are spread over WikiText-2's test split: the increase of
perplexity, KL(p16 || p) a token, and that less the first row's, window by window, with its standard
error. Seconds are of the CPU, quantization alone.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
from in_16_bits import Differences, In16Bits, parser_of, with_error

from dpq_core.checkpoint.native import load_quantized
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme


def section_of(name: str, samples: int, length: int) -> CalibrationSection:
    """A row: `original`, `quantized`, `groups`, or a correction."""
    changes = {"propagation": name}
    if name[0].isdigit():
        changes = {"propagation": "groups", "correction": name}
    sizes = {"samples": samples, "sequence_length": length, "batch_size": 4}
    return CalibrationSection.model_validate(
        {"dataset": TextDataset(path="none").model_dump(), **sizes, **changes}
    )


def main() -> None:
    parser = parser_of(__doc__, samples=16, windows=12)
    parser.add_argument("--rows", nargs="+", default=["original", "groups", "0.5"])
    arguments = parser.parse_args()
    sizes = arguments.samples, arguments.length
    original = In16Bits(arguments.model, arguments.data, arguments.windows, batch=4)
    calibrated, differences = original.calibrated(*sizes), Differences()
    print("| row | increase | KL | less the first's | layer error | corrected | CPU s |")
    for name in arguments.rows:
        with tempfile.TemporaryDirectory() as work:
            before = sum(os.times()[:2])
            section = section_of(name, *sizes)
            out = Path(work, "out")
            made = quantize_checkpoint(arguments.model, out, calibrated, Scheme(), section, {})
            rows, seconds = made["layers"], sum(os.times()[:2]) - before
            found = original.scored(load_quantized(out))
        means = [
            float(np.mean([row.get(key, 0) for row in rows])) for key in ("error", "corrected")
        ]
        print(
            f"| {name} | {found.perplexity - original.scores.perplexity:+.3f} |"
            f" {np.mean(found.divergence):.4f} | {with_error(differences.of(found), '+.4f')} |"
            f" {means[0]:.5f} | {means[1]:.5f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
