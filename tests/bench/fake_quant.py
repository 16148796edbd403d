"""Time of a fake-quantized (W4A8) forward beside the BF16 model's, at the same batch, on the CPU.

    python tests/bench/fake_quant.py [--repeats N] [--model FOLDER ...]

Batches as evaluation forms them: 16 windows of 512 tokens (perplexity) and 64 sequences of 64
(requests), on one thread and on all. The forwards of the two models alternate; reported is the
least time of each, and their ratio, which is to stay below 1.5. Models: the quickstart's, those
in ../shared/models that are there, and a Llama of hidden 1024 with random weights.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dpq_core.checkpoint.native import load_model
from dpq_core.machine.device import whole_machine
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

ROOT = Path(__file__).parents[2]
MODELS = [ROOT / "recipes/quickstart/model", ROOT.parent / "shared/models/wiki-llama-12m"]
BATCHES = [(16, 512), (64, 64)]  # sequences, tokens
LIMIT = 1.5


def make_wide_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def quantized(model: Path, folder: Path) -> Path:
    """RTN at the default formats, the activations' scales from four windows of random tokens."""
    vocabulary = load_model(model).config.vocab_size
    quantize_checkpoint(
        model,
        folder,
        random_tokens(vocabulary, 4, 64),
        Scheme(method="rtn", rounding="nearest"),
        # So few tokens would leave wide layers in 16 bits.
        CalibrationSection(
            dataset=TextDataset(path="none"), required_tokens_per_input=0, min_tokens_per_input=0
        ),
        about={},
    )
    return folder


def random_tokens(vocabulary: int, sequences: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (sequences, length), generator=generator)


@torch.inference_mode()
def least_seconds(models: list[Any], tokens: Tensor, repeats: int) -> list[float]:
    """Of one forward of each, in turn; the first round is not counted."""
    seconds = [float("inf")] * len(models)
    for repeat in range(repeats + 1):
        for position, model in enumerate(models):
            started = time.perf_counter()
            model(input_ids=tokens, use_cache=False)
            if repeat:
                seconds[position] = min(seconds[position], time.perf_counter() - started)
    return seconds


def measure(folder: Path, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        models = [load_model(folder), load_model(quantized(folder, Path(temporary, "w4a8")))]
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        torch.set_num_threads(threads)
        for batch in BATCHES:
            tokens = random_tokens(models[0].config.vocab_size, *batch)
            bf16, w4a8 = least_seconds(models, tokens, repeats)
            print(
                f"{folder.name:16} {threads:7} {batch[0]:4} × {batch[1]:<4}"
                f" {bf16:8.3f} {w4a8:8.3f} {w4a8 / bf16:6.2f}{' !' * (w4a8 > LIMIT * bf16)}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", type=Path, nargs="*", help="default: see above")
    arguments = parser.parse_args()
    print(f"{'model':16} {'threads':>7} {'batch':>11} {'BF16 s':>8} {'W4A8 s':>8} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as temporary, whole_machine():
        models = arguments.model
        if not models:
            present = [folder for folder in MODELS if folder.is_dir()]
            models = [*present, make_wide_model(Path(temporary, "hidden-1024"))]
        for folder in models:
            measure(folder, arguments.repeats)


if __name__ == "__main__":
    main()
