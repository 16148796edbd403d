"""Quantizing beside peers: same model, same tokens, same threads, one run.

    python tests/bench/peers.py [RECIPE] [--folder .peers] [--only NAME ...] [--windows N]
                                [--model 150m --blocks N] [--scored N]

The peers live in an environment of their own below `--folder`, made at the first run (minutes).
Each row is a process of its own that takes the recipe's calibration windows from a file and leaves
a checkpoint. Seconds are without imports; ours read and write while they quantize, so that only the
second pair compares like with like. Our kernels are found in Numba's cache; `definition` has the
loop in plain torch. Perplexity is of what was left, read by `load_model`, on the recipe's text; a
model of random weights has none.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from peak_memory import MODELS, make_model
from quantize import RECIPE, compile_kernels
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dpq_core.checkpoint.native import load_model
from dpq_core.data.texts import calibration_windows, load_texts, token_windows
from dpq_core.evaluation.perplexity import perplexity_token
from dpq_core.kernels import cpu
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, Recipe, load_recipe
from dpq_core.recipe.scheme import Scheme

PACKAGES = ("torch==2.13.0", "llmcompressor==0.14.0.1", "auto-round==0.15.1")
PEERS = {
    "llm-compressor, GPTQ W4A16": ("llm-compressor-unordered", "W4A16"),
    "llm-compressor, GPTQ W4AFP8": ("llm-compressor-unordered", "W4AFP8"),
    "AutoRound, light, W4A16": ("auto-round", "W4A16"),
}
GPTQ = {
    "method": "gptq",
    "inner": "none",
    "activations": "none",
    "symmetric": True,
    "order": "none",
    "rounding": "nearest",
}
OURS = {
    "GPTQ W4A16": GPTQ,
    "GPTQ W4A16, definition": GPTQ,
    "DPQ W4A8, `hopper-vllm`": {"preset": "hopper-vllm"},
    "DPQ W4A8, `activation`, Hessian search, gradient": {"scale_search": "hessian"},
}
WINDOWS_AT_ONCE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE)
    parser.add_argument("--folder", type=Path, default=Path(".peers"))
    parser.add_argument("--only", nargs="+", choices=[*PEERS, *OURS], default=[*PEERS, *OURS])
    parser.add_argument("--windows", type=int)
    parser.add_argument("--scored", type=int, default=64, help="windows of the perplexity")
    parser.add_argument("--model", choices=MODELS, help="random weights instead of the recipe's")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        run_ours(*arguments.row)
    else:
        compare(load_recipe(arguments.recipe), arguments)


def compare(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """All rows, one after the other."""
    section, length = recipe.calibration, recipe.calibration.sequence_length
    python = environment(arguments.folder) if set(arguments.only) & set(PEERS) else None
    for scheme in OURS.values():
        compile_kernels(Scheme(**scheme), section)
    with tempfile.TemporaryDirectory() as work:
        source, tokens = Path(recipe.model.id), Path(work, "tokens.safetensors")
        if arguments.model:
            source = Path(work, "model")
            make_model(source, arguments.model, arguments.blocks)
        windows = windows_of(recipe, source, arguments.windows or section.samples)
        save_file({"tokens": windows}, tokens)
        print(f"{len(windows)} × {length} tokens, {torch.get_num_threads()} threads\n")
        print("| | quantize, wall | CPU | with loading and saving, wall | CPU | perplexity |")
        print("|---|---|---|---|---|---|")
        if not arguments.model:
            print(f"| 16 bits | | | | | {scored(recipe, source, source, arguments.scored)} |")
        for number, name in enumerate(arguments.only):
            folder = Path(work, str(number))
            inputs = str(source), str(tokens), str(folder), str(section.batch_size)
            if name in PEERS:
                script = str(Path(__file__).with_name("peer.py"))
                seconds = run([str(python), script, *PEERS[name], *inputs])
            else:
                seconds = run([sys.executable, __file__, "--row", name, *inputs])
            wall, used = seconds["wall"], seconds["cpu"]
            whole = wall["quantize"], used["quantize"], sum(wall.values()), sum(used.values())
            cells = [f"{each:.1f}" for each in whole]
            value = "–" if arguments.model else scored(recipe, source, folder, arguments.scored)
            print(f"| {name} | {' | '.join([*cells, value])} |", flush=True)


def windows_of(recipe: Recipe, source: Path, samples: int) -> torch.Tensor:
    """Calibration windows [samples, length] of the recipe, or random ones for a made model."""
    section, length = recipe.calibration, recipe.calibration.sequence_length
    if source != Path(recipe.model.id):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(32000, (samples, length), generator=generator)
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = load_texts(section.dataset)
    return calibration_windows(texts, tokenizer, samples, length).contiguous()


def environment(folder: Path) -> Path:
    """The Python of the peers' environment, which is made where it is missing."""
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.is_file():
        print(f"making the peers' environment in {folder} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES]
        subprocess.run(command, check=True)
        ready.touch()
    return python.absolute()


def run(command: list[str]) -> dict[str, dict[str, float]]:
    """The line of JSON that ends a row's output; what it printed before is shown where it fails."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(command)} failed")
    seconds: dict[str, dict[str, float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds


def run_ours(name: str, source: str, tokens: str, folder: str, batch: str) -> None:
    """A row of `OURS`: everything from reading to writing counts as quantizing."""
    windows = load_file(tokens)["tokens"]
    section = CalibrationSection(
        dataset={"path": "json", "data_files": tokens},
        samples=len(windows),
        sequence_length=windows.shape[1],
        batch_size=int(batch),
    )
    plain = "definition" in name
    with patch.object(cpu, "fits", return_value=False) if plain else nullcontext():
        wall, used = time.perf_counter(), time.process_time()
        quantize_checkpoint(
            Path(source), Path(folder), windows, Scheme(**OURS[name]), section, {"bench": name}
        )
        wall, used = time.perf_counter() - wall, time.process_time() - used
    nothing = {"load": 0.0, "save": 0.0}
    print(json.dumps({"wall": nothing | {"quantize": wall}, "cpu": nothing | {"quantize": used}}))


def scored(recipe: Recipe, source: Path, folder: Path, windows: int) -> str:
    """Perplexity of a checkpoint on the recipe's text, by the original's tokenizer."""
    text = recipe.evaluation.perplexity
    assert text is not None
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = token_windows(load_texts(text.dataset), tokenizer, text.sequence_length)[:windows]
    return f"{perplexity_token(load_model(folder), tokens, WINDOWS_AT_ONCE).value:.3f}"


if __name__ == "__main__":
    main()
