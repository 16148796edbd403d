"""Accuracy beside peers on a real model: same model, same calibration tokens, same groups.

    PYTHONPATH=tests:tests/bench:. python tests/bench/accuracy_beside_peers.py MODEL
        [--data ../shared/data] [--samples 48] [--windows 12] [--rows NAME ...] [--peers .peers]

Calibrated on windows of 512 tokens of C4, scored on windows that are spread over WikiText-2's test
split: the increase of perplexity, KL(p16 || p) a token with its standard error over windows, and
that less the first row's, window by window. Peers live in an environment of their own, which
`peers.py` makes; what they leave is read by `load_model`, the rounding of 8-bit inputs included.
CPU seconds are of quantization, without imports.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peers
from correction import CALIBRATION, SCORED, scored_windows, texts_of
from methods_score import WindowScores, reference, score_windows
from safetensors.torch import save_file

from dpq_core.checkpoint.native import load_model
from dpq_core.data.texts import calibration_windows, opening_token
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection
from dpq_core.recipe.scheme import Scheme
from tasks.support.model import load_tokenizer

GROUP, LENGTH, BATCH = 64, 512, 4
PAPER = {"order": "gar", "rounding": "nearest"}
PLAIN_H = {"token_weights": "plain", "first_token_share": 0}
HALF = {"propagation": "groups", "correction": 0.5}
DYNAMIC = {"activations": "dynamic"}
OURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the scheme, of the calibration
    "default": ({}, {}),
    "default, dynamic": (DYNAMIC, {}),
    "default, dynamic, correction 0.5": (DYNAMIC, HALF),
    "default, dynamic, Hessian search, correction 0.5": (
        {**DYNAMIC, "scale_search": "hessian"},
        HALF,
    ),
    "the paper's method": (PAPER, PLAIN_H),
    "rtn W4A8, dynamic": ({"method": "rtn", "order": "none", "rounding": "nearest", **DYNAMIC}, {}),
}
PEERS = {
    "llm-compressor GPTQ W4AFP8": ("llm-compressor", "W4AFP8"),
    "llm-compressor AWQ W4AFP8": ("llm-compressor-awq", "W4AFP8"),
    "AutoRound light W4A16": ("auto-round", "W4A16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    names = [*OURS, *PEERS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="NAME")
    arguments = parser.parse_args()
    folder, tokenizer = arguments.model, load_tokenizer(arguments.model)
    opening = opening_token(tokenizer, "auto")
    texts = list(texts_of(arguments.data / CALIBRATION))
    calibrated = calibration_windows(texts, tokenizer, arguments.samples, LENGTH, opening)
    texts = list(texts_of(arguments.data / SCORED))
    scored = scored_windows(texts, tokenizer, opening, arguments.windows)
    leading = 1 if opening is None else 2
    model = load_model(folder)
    old = reference(model, scored, BATCH)
    base = score_windows(model, scored, old, leading, BATCH)
    del model
    print(f"16 bits: {base.perplexity:.4f}; load {os.getloadavg()[0]:.1f}", flush=True)
    print("| row | increase | KL | less the first's | agreement | CPU s |")
    print("|---|--:|--:|--:|--:|--:|")
    first: np.ndarray | None = None
    for name in arguments.rows:
        with tempfile.TemporaryDirectory() as work:
            out = Path(work, "out")
            quantize = _by_peer if name in PEERS else _by_us
            seconds = quantize(name, folder, calibrated, out, arguments.peers)
            found = score_windows(load_model(out), scored, old, leading, BATCH)
        divergence = np.array(found.divergence)
        first = divergence if first is None else first
        print(_line(name, found, base.perplexity, divergence - first, seconds), flush=True)


def _line(
    name: str, found: WindowScores, base: float, difference: np.ndarray, seconds: float
) -> str:
    agreement = 100 * float(np.mean(found.agreement))
    cells = (
        f"{found.perplexity - base:+.3f}",
        _mean(np.array(found.divergence), ".4f"),
        _mean(difference, "+.4f"),
        f"{agreement:.2f}",
        f"{seconds:.0f}",
    )
    return f"| {name} | {' | '.join(cells)} |"


def _mean(values: np.ndarray, spec: str) -> str:
    error = values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():{spec}} ± {error:.4f}"


def _by_us(name: str, source: Path, windows: Any, out: Path, _: Path) -> float:
    scheme, changes = OURS[name]
    before = sum(os.times()[:2])
    section = CalibrationSection(
        dataset={"path": "none"},
        samples=len(windows),
        sequence_length=LENGTH,
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
