"""Accuracy beside peers on a real model: same model, same calibration tokens, same groups.

    PYTHONPATH=tests:tests/bench:. python tests/bench/accuracy_beside_peers.py MODEL
        [--data ../shared/data] [--samples 48] [--windows 12] [--rows NAME ...] [--peers .peers]

Calibrated on windows of C4, scored on windows that are spread over WikiText-2's test split: the
increase of perplexity, KL(p16 || p) a token with its standard error over windows, and that less the
first row's, window by window. Peers live in an environment of their own, which `peers.py` makes;
what they leave is read by `load_model`, the rounding of 8-bit inputs included.
CPU seconds are of quantization, without imports.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peers
from in_16_bits import Differences, In16Bits, parser_of, with_error
from safetensors.torch import save_file

from dpq_core.checkpoint.native import load_model
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection
from dpq_core.recipe.scheme import Scheme

GROUP, BATCH = 64, 4
PAPER = {"order": "gar", "rounding": "nearest"}
PLAIN_H = {"token_weights": "plain", "first_token_share": 0}
HALF = {"propagation": "groups", "correction": 0.5}
DYNAMIC = {"activations": "dynamic"}
INT8 = {"inner": "int8", **DYNAMIC}
RTN = {"method": "rtn", "order": "none", "rounding": "nearest"}
OURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the scheme, of the calibration
    "default": ({}, {}),
    "default, dynamic": (DYNAMIC, {}),
    "default, dynamic, correction 0.5": (DYNAMIC, HALF),
    "default, dynamic, Hessian search, correction 0.5": (
        {**DYNAMIC, "scale_search": "hessian"},
        HALF,
    ),
    "the paper's method": (PAPER, PLAIN_H),
    "rtn W4A8, dynamic": ({**RTN, **DYNAMIC}, {}),
    "QServe-like: rtn, INT8 inputs": ({**RTN, **INT8}, {}),
    "QQQ-like: dpq, nearest, INT8 inputs": ({"rounding": "nearest", **INT8}, {}),
    "W16A8, static": ({"method": "none"}, {}),
    "W16A8, dynamic": ({"method": "none", **DYNAMIC}, {}),
}
PEERS = {
    "llm-compressor GPTQ W4AFP8": ("llm-compressor", "W4AFP8"),
    "llm-compressor GPTQ W4AFP8, columns as stored": ("llm-compressor-unordered", "W4AFP8"),
    "llm-compressor AWQ W4AFP8": ("llm-compressor-awq", "W4AFP8"),
    "AutoRound light W4A16": ("auto-round", "W4A16"),
}


def main() -> None:
    parser = parser_of(__doc__, samples=48, windows=12)
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    names = [*OURS, *PEERS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="NAME")
    arguments = parser.parse_args()
    original = In16Bits(arguments.model, arguments.data, arguments.windows, BATCH)
    calibrated = original.calibrated(arguments.samples, arguments.length)
    base, differences = original.scores.perplexity, Differences()
    print("| row | increase | KL | less the first's | agreement | CPU s |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in arguments.rows:
        with tempfile.TemporaryDirectory() as work:
            out = Path(work, "out")
            quantize = _by_peer if name in PEERS else _by_us
            try:
                seconds = quantize(name, arguments.model, calibrated, out, arguments.peers)
            except SystemExit as error:  # of a peer: the rows after it are made all the same
                print(f"| {name} | failed | | | | |", flush=True)
                print(error, file=sys.stderr)
                continue
            found = original.scored(load_model(out))
        cells = (
            f"{found.perplexity - base:+.3f}",
            with_error(np.array(found.divergence), ".4f"),
            with_error(differences.of(found), "+.4f"),
            f"{100 * np.mean(found.agreement):.2f}",
            f"{seconds:.0f}",
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _by_us(name: str, source: Path, windows: Any, out: Path, _: Path) -> float:
    scheme, changes = OURS[name]
    before = sum(os.times()[:2])
    section = CalibrationSection(
        dataset={"path": "none"},
        samples=len(windows),
        sequence_length=windows.shape[1],
        batch_size=BATCH,
        **changes,
    )
    quantize_checkpoint(source, out, windows, Scheme(group_size=GROUP, **scheme), section, {})
    return sum(os.times()[:2]) - before


def _by_peer(name: str, source: Path, windows: Any, out: Path, environment: Path) -> float:
    """A peer is given the tokens in a file."""
    tool, scheme = PEERS[name]
    tokens = out.with_name("tokens.safetensors")
    save_file({"tokens": windows.contiguous()}, tokens)
    script = Path(__file__).with_name("peer.py")
    python = peers.environment(environment)
    words = (python, script, tool, f"{scheme}/{GROUP}", source, tokens, out, BATCH)
    return float(peers.run([str(word) for word in words])["cpu"]["quantize"])


if __name__ == "__main__":
    main()
