"""Why compensation loses, or wins, against rounding on a real model: one suspect a row.

    python tests/bench/why.py --prepare MODEL TOKENS.npz --data ../shared/data
    python tests/bench/why.py MODEL TOKENS.npz [--device cuda] [--quick] [--only NAME ...]
                              [--out ROWS.jsonl] [--train STEPS] [--bos] [--first N] [--skip N]

MODEL is a folder of the Llama kind; TOKENS.npz, made once by `--prepare` (the only step that reads
texts), holds streams of tokens: C4 to calibrate, other C4 as held-out windows, yet other C4 to
train, WikiText-2 train and test. Needs torch, transformers, numpy, safetensors, numba and pydantic
alone. Rows are printed and appended to `--out` one by one, so that a cut keeps what was done:

    increase     of perplexity, WikiText-2 test, windows of 512 and of 2,048
    divergence   KL(p16 || p) a token, of both
    error        mean relative layer error, on calibration tokens, on held-out ones, and on these
                 with equal norms (where sinks have no more say than others)

`--train` first continues the training of the model for so many steps, and all rows are of the
result: its weights lie on no 4-bit grid, which rounding would find again. Rows stand in order of
value: `--first` and `--skip` cut the list.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from token_streams import streams_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from why_model import (
    Quantized,
    Score,
    Statistics,
    Variant,
    hidden_states,
    original_statistics,
    quantize_model,
    restored,
    score,
)
from why_train import continue_training

from dpq_core.recipe.scheme import Scheme

TEXTS = {  # stream: file, column, what stands between rows (None: end of text)
    "c4": ("c4_sample/c4_train_00000_first.jsonl.gz", "text", None),
    "train": ("c4_sample/olmo_c4_1000.jsonl.gz", "text", None),
    "wiki": ("wikitext2_raw_train_slice/train_first1MB.jsonl.gz", "text", "\n\n"),
    "test": ("wikitext2_raw_test/test.jsonl.gz", "text", "\n\n"),
}
HELD_OUT = 32_768  # last tokens of `c4`, in no Hessian

W16 = {"inner": "none", "activations": "none", "rounding": "nearest", "order": "none"}
RTN, GPTQ = {"method": "rtn", **W16}, {"method": "gptq", **W16}
G64, G128 = {"group_size": 64, "symmetric": True}, {"group_size": 128}
PAPER = {"method": "dpq", "order": "gar", "rounding": "nearest"}


def row(*parts: dict[str, Any], **rest: Any) -> Variant:
    scheme: dict[str, Any] = {}
    for part in parts:
        scheme |= part
    return Variant(Scheme(**scheme), **rest)


# In order of value: a cut run has the first of them.
NO_SINKS = r"^(?!.*layers\.(11|28)\.mlp\.down)"  # SmolLM2-135M: inputs that one direction owns
OURS = "unit 0.125"
FINE = {"order": "activation", "rounding": "gradient"}
VARIANTS = {
    "rtn": row(RTN, G64),
    "gptq": row(GPTQ, G64),
    "gptq, block by block": row(GPTQ, G64, propagation="block"),
    "gptq, group by group": row(GPTQ, G64, propagation="group"),
    "gptq, norms equal": row(GPTQ, G64, weighting="unit"),
    "gptq, product's weights": row(GPTQ, G64, weighting=OURS),
    "gptq, product's weights, block by block": row(GPTQ, G64, weighting=OURS, propagation="block"),
    "gptq, share 0.02": row(GPTQ, G64, weighting="unit 0.02"),
    "gptq, share 0.5": row(GPTQ, G64, weighting="unit 0.5"),
    "gptq, Fisher": row(GPTQ, G64, weighting="fisher"),
    "rtn of all but sinks": row(RTN, G64, only=NO_SINKS),
    "gptq of all but sinks": row(GPTQ, G64, only=NO_SINKS),
    "rtn of all but v": row(RTN, G64, only="(q|k|o|gate|up|down)_proj"),
    "gptq of all but v": row(GPTQ, G64, only="(q|k|o|gate|up|down)_proj"),
    "gptq, norms capped": row(GPTQ, G64, weighting="cap"),
    "gptq, first token an eighth": row(GPTQ, G64, weighting="first 0.125"),
    "gptq, damping 0.1": row(GPTQ, G64, {"damp_frac": 0.1}),
    "gptq, damping 1": row(GPTQ, G64, {"damp_frac": 1.0}),
    "gptq, damping 1, norms equal": row(GPTQ, G64, {"damp_frac": 1.0}, weighting="unit"),
    "gptq, tenth of the tokens": row(GPTQ, G64, share=0.1),
    "gptq, WikiText train": row(GPTQ, G64, text="wiki"),
    "gptq, WikiText test": row(GPTQ, G64, text="test"),
    "gptq, sinks dropped": row(GPTQ, G64, weighting="drop"),
    "gptq, gar": row(GPTQ, G64, {"order": "gar"}),
    "gptq, activation": row(GPTQ, G64, {"order": "activation"}),
    "gptq, activation, gradient": row(GPTQ, G64, FINE),
    "gptq, activation, gradient, product's weights": row(GPTQ, G64, FINE, weighting=OURS),
    "gptq, activation, gradient, Fisher": row(GPTQ, G64, FINE, weighting="fisher"),
    "rtn 128": row(RTN, G128),
    "gptq 128": row(GPTQ, G128),
    "gptq 128, block by block": row(GPTQ, G128, propagation="block"),
    "rtn 128 W4A8": row({"method": "rtn", "activations": "dynamic", "rounding": "nearest"}, G128),
    "paper 128, plain weights": row(PAPER, G128),
    "paper 128": row(PAPER, G128, weighting=OURS),
    "default 128, plain weights": row(),
    "default 128": row(weighting=OURS),
    "default 128, block by block": row(propagation="block", weighting=OURS),
    "default 128, Fisher": row({"activations": "dynamic"}, weighting="fisher"),
    "default 128, Hessian ranges": row({"scale_search": "hessian"}, weighting=OURS),
    "rtn, mse ranges": row(RTN, G64, {"scale_search": "mse"}),
    "gptq, mse ranges": row(GPTQ, G64, {"scale_search": "mse"}),
    **{
        f"{name} of {what}": row(scheme, G64, only=only)
        for what, only in {
            "q, k": "q_proj|k_proj",
            "v": "v_proj",
            "o": "o_proj",
            "gate, up": "gate_proj|up_proj",
            "down": "down_proj",
            "blocks 0-9": r"layers\.\d\.",
            "blocks 10-19": r"layers\.1\d\.",
            "blocks 20-29": r"layers\.2\d\.",
        }.items()
        for name, scheme in {"rtn": RTN, "gptq": GPTQ}.items()
    },
}
QUICK = "rtn", "gptq", "gptq, block by block"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--prepare", action="store_true", help="make TOKENS from texts")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("why.jsonl"))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", default=[])
    parser.add_argument("--first", type=int, help="so many rows of the list")
    parser.add_argument("--skip", type=int, default=0, help="rows of the list")
    parser.add_argument("--quick", action="store_true", help="a few thousand tokens, three rows")
    parser.add_argument("--windows", type=int, default=128, help="to calibrate")
    parser.add_argument("--length", type=int, default=2048, help="of calibration windows")
    parser.add_argument("--scored", type=int, default=131_072, help="tokens of each length")
    parser.add_argument("--batch", type=int, default=16_384, help="tokens at a time")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048], help="scored")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--bos", action="store_true", help="before every window")
    parser.add_argument("--train", type=int, default=0, help="steps of 16 × 512 tokens")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--noise", type=float, default=0.5, help="in steps of the old grid")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.model, arguments.tokens, arguments.data)
        return
    if arguments.quick:
        arguments.windows, arguments.length, arguments.scored = 4, 512, 2048
        arguments.only = arguments.only or QUICK
    chosen = arguments.only or list(VARIANTS)[arguments.skip :][: arguments.first]
    Bench(arguments).run(chosen)


def prepare(model: Path, target: Path, data: Path) -> None:
    """Streams of tokens as uint16 or int32, whichever is smaller."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    streams = streams_of(TEXTS, tokenizer, data)
    streams["bos"] = np.array(tokenizer.bos_token_id)
    np.savez_compressed(target, **streams)


class Bench:
    """A model, its tokens, and what rows share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        torch.backends.cuda.matmul.allow_tf32 = False
        dtype = getattr(torch, arguments.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        self.model.to(arguments.device).eval()
        streams = np.load(arguments.tokens)
        self.bos = int(streams["bos"]) if arguments.bos else None
        self.streams = {name: torch.from_numpy(streams[name].astype(np.int64)) for name in TEXTS}
        c4 = self.streams["c4"]
        self.streams["c4"], self.streams["held-out"] = c4[:-HELD_OUT], c4[-HELD_OUT:]
        self.cached: dict[tuple[Any, ...], Statistics] = {}

    def run(self, names: list[str]) -> None:
        """Rows of the model, which is trained first where that is asked for."""
        if self.arguments.train:
            self.train()
        self.look()
        for name in names:
            started = time.perf_counter()
            with restored(self.model):
                quantized = self.quantize(VARIANTS[name])
                scores = self.scores()
            self.record(name, quantized, scores, time.perf_counter() - started)

    def train(self) -> None:
        own = self.arguments
        self.model.train()
        settings = own.train, own.rate, own.noise
        done = continue_training(self.model, self.streams["train"], *settings, seed=0, batch=16)
        self.model.eval()
        self.write({"trained": done})
        print(json.dumps(done), flush=True)

    def look(self) -> None:
        """The 16-bit model: its perplexity, and what rows are compared with."""
        started = time.perf_counter()
        self.references = {
            length: hidden_states(self.model, self.scored(length), self.batch(length))
            for length in self.arguments.lengths
        }
        windows = self.windows("held-out", 0.25)
        plain, even = (
            original_statistics(self.model, windows, row(weighting=weighting), self.batch())
            for weighting in ("none", "unit")
        )
        self.held_out = plain, even
        self.baseline = self.scores()
        self.record("16 bits", Quantized(), self.baseline, time.perf_counter() - started)

    def quantize(self, variant: Variant) -> Quantized:
        windows = self.windows(variant.text, variant.share)
        statistics = None
        if variant.propagation == "original":
            key = variant.text, variant.share, variant.weighting, variant.scheme.activations
            if key not in self.cached:
                while len(self.cached) > 2:
                    self.cached.pop(next(iter(self.cached)))
                static = variant.scheme.activations == "static"
                self.cached[key] = original_statistics(
                    self.model, windows, variant, self.batch(), static
                )
            statistics = self.cached[key]
        return quantize_model(self.model, variant, windows, statistics, self.held_out, self.batch())

    def windows(self, text: str, share: float) -> Tensor:
        """Windows to calibrate, spread evenly over a stream. [windows, length]"""
        length, own = self.arguments.length, self.cut(text, self.arguments.length)
        count = max(1, min(len(own), round(self.arguments.windows * share)))
        assert own.shape[1] == length + (self.bos is not None)
        return own[torch.arange(count) * len(own) // count]

    def scored(self, length: int) -> Tensor:
        """Windows of the test text, spread evenly over it."""
        own = self.cut("test", length)
        count = max(1, min(len(own), self.arguments.scored // length))
        return own[torch.arange(count) * len(own) // count]

    def cut(self, text: str, length: int) -> Tensor:
        stream = self.streams[text]
        windows = stream[: len(stream) // length * length].view(-1, length)
        if self.bos is None:
            return windows
        return torch.cat([torch.full((len(windows), 1), self.bos), windows], 1)

    def batch(self, length: int | None = None) -> int:
        return max(1, self.arguments.batch // (length or self.arguments.length))

    def scores(self) -> dict[int, Score]:
        """Of both lengths of windows; the token after a window's first is the first predicted."""
        first = 1 if self.bos is None else 2
        return {
            length: score(self.model, self.scored(length), states, first, self.batch(length))
            for length, states in self.references.items()
        }

    def record(
        self, name: str, quantized: Quantized, scores: dict[int, Score], seconds: float
    ) -> None:
        found: dict[str, Any] = {"variant": name, "training_steps": self.arguments.train}
        for length, own in scores.items():
            found[f"perplexity_{length}"] = own.perplexity
            found[f"increase_{length}"] = own.perplexity - self.baseline[length].perplexity
            found[f"divergence_{length}"] = own.divergence
        for number, kind in enumerate(("calibration", "held_out", "held_out_even")):
            errors = [each[number] for each in quantized.errors.values()]
            found[f"error_{kind}"] = sum(errors) / max(len(errors), 1)
        found["seconds"] = seconds
        cells = [f"{key} {value:.4f}" for key, value in found.items() if isinstance(value, float)]
        print(f"{name:32} {'  '.join(cells)}", flush=True)
        nats = {length: own.nats for length, own in scores.items()}
        self.write({**found, "layers": quantized.errors, "nats": nats})

    def write(self, record: dict[str, Any]) -> None:
        settings = {key: str(value) for key, value in vars(self.arguments).items() if key != "only"}
        settings["torch"] = torch.__version__
        if self.arguments.device.startswith("cuda"):
            settings["card"] = torch.cuda.get_device_name()
        with self.arguments.out.open("a") as out:
            out.write(json.dumps({**record, "settings": settings}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
