"""Methods of quantization on a real model, beside one another: the rows of `docs/results.md`.

    PYTHONPATH=tests python tests/bench/methods_table.py prepare MODEL PREPARED
                        [--data ../shared/data] [--documents N] [--per-subject N]
    python tests/bench/methods_table.py run MODEL PREPARED [--device cuda] [--out ROWS.jsonl]
                                        [--workers N] [--seconds S] [--only NAME ...] [--quick]
                                        [--samples N] [--length N] [--windows N] [--peers FOLDER]

MODEL is a folder of the Llama or Gemma 3 kind. `prepare` reads texts and lm-evaluation-harness once
and writes two files of arrays; `run` needs torch, transformers, safetensors, numba and pydantic
alone. Rows (`methods_rows.py`) are appended to ROWS.jsonl one by one and those that are there are
not measured again, so a run that is cut off goes on where it was. `methods_markdown.py` makes
tables of them.

What a row has: nats, divergence from the 16-bit model and agreement of every window of WikiText-2's
test split, 2,048 and 512 tokens long (`methods_score`); mean relative layer error on the tokens of
the Hessian, on C4 that no Hessian has seen, and on these with equal norms; bits; seconds; answers
of the suites. Gemma reads BOS before every window, of calibration too. Windows with even numbers
are there to choose by, those with odd ones to report.

`--workers` are processes that share the device and the list: a GPU waits for one of them half of
the time. `--quick` has few tokens and three rows. On a CPU `--samples 48 --length 512 --windows 48`
makes a row a matter of minutes; scored windows are then spread over the text. `--peers` is where
the environment of other projects' tools is, or is made: their rows get the same windows of tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import peers
import torch
from methods_model import Quantized, Statistics, Subject, original_statistics, quantize_model
from methods_rows import FULL, QUICK, ROWS, SCORED, SUBJECTS, Row, full, row
from methods_score import Suites, WindowScores, reference, score_suites, score_windows
from methods_transforms import transform
from safetensors.torch import save_file
from token_streams import streams_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpq_core.checkpoint.native import load_model

TEXTS = {  # stream: file, column, what stands between rows (None: end of text)
    "c4": ("c4_sample/c4_train_00000_first.jsonl.gz", "text", None),
    "wiki": ("wikitext2_raw_train_slice/train_first1MB.jsonl.gz", "text", "\n\n"),
    "questions": ("web_questions/train.jsonl.gz", "question", None),
    "test": ("wikitext2_raw_test/test.jsonl.gz", "text", "\n\n"),
}
HELD_OUT = 32_768  # last tokens of `c4`, in no Hessian
LENGTHS = 2048, 512
SIXTEEN = {"inner": "none", "activations": "none", "method": "rtn"}  # inputs as they are


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("prepare", "run"))
    parser.add_argument("model", type=Path)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("rows.jsonl"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no row begins")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows, or full:ROW")
    parser.add_argument("--quick", action="store_true", help="a few thousand tokens, three rows")
    parser.add_argument("--samples", type=int, default=128, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each of them")
    parser.add_argument("--windows", type=int, help="scored ones of each length, instead of all")
    parser.add_argument("--peers", type=Path, help="folder of the peers' environment")
    parser.add_argument("--documents", type=int, help="of each suite, instead of the rows' numbers")
    parser.add_argument("--per-subject", type=int, help="of MMLU's subjects, to prepare")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.verb == "prepare":
        prepare(arguments)
        return
    if arguments.claims:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as claims:
        command = [sys.executable, *sys.argv, "--claims", claims]
        workers = [subprocess.Popen(command) for _ in range(arguments.workers)]
        failed = [worker.wait() for worker in workers]
    if any(failed):
        raise SystemExit(f"workers ended with {failed}")


def prepare(arguments: argparse.Namespace) -> None:
    """`tokens.npz`, streams as uint16 or int32, and `suites.npz`."""
    from methods_suites import SUITES, arrays_of

    from dpq_core.evaluation.suites.definitions import SuiteSources, loaded_suites

    folder, prepared, data = arguments.model, arguments.prepared, arguments.data
    prepared.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    streams = streams_of(TEXTS, tokenizer, data)
    np.savez_compressed(prepared / "tokens.npz", **streams)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with loaded_suites(SUITES, SuiteSources(mirror=data)) as suites:
        limits = dict.fromkeys(suites, arguments.documents) | {"mmlu": arguments.per_subject}
        arrays = arrays_of(model, tokenizer, suites, limits)
    np.savez_compressed(prepared / "suites.npz", **arrays)
    print(f"suites: {len(arrays['tokens']):,} tokens", flush=True)


def work(arguments: argparse.Namespace) -> None:
    """Rows that nobody has taken, until there are none or time is out."""
    started, bench = time.monotonic(), Bench(arguments)
    for each in wanted(arguments):
        if time.monotonic() - started > arguments.seconds:
            break
        if bench.knows(each) and _claimed(arguments.claims, each.name):
            bench.attempt(each)


def wanted(arguments: argparse.Namespace) -> list[Row]:
    """Rows in order, less those that are there."""
    names = arguments.only or (QUICK if arguments.quick else [*ROWS, *(f"full:{n}" for n in FULL)])
    there = set()
    if arguments.out.is_file():
        lines = map(json.loads, arguments.out.read_text().splitlines())
        there = {line["row"] for line in lines if "error" not in line}
    rows = []
    for name in names:
        kind, _, short = name.rpartition("full:")
        if name not in there:
            rows.append(full(name, ROWS[short]) if kind or "full:" in name else ROWS[name])
    return rows


def _claimed(folder: Path, name: str) -> bool:
    try:
        (folder / name.replace("/", "_")).open("x").close()
    except FileExistsError:
        return False
    return True


class Bench:
    """A model, its tokens, and what rows share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.samples, self.length, self.most = (
            arguments.samples,
            arguments.length,
            arguments.windows,
        )
        if arguments.quick:
            self.samples, self.length, self.most = 2, 256, 2
        self.at_once = 16_384 if self.device.type == "cuda" else 1024  # tokens
        streams = np.load(arguments.prepared / "tokens.npz")
        self.streams = {name: torch.from_numpy(streams[name].astype(np.int64)) for name in TEXTS}
        c4 = self.streams["c4"]
        self.streams["c4"], self.streams["held-out"] = c4[:-HELD_OUT], c4[-HELD_OUT:]
        file = arguments.prepared / "suites.npz"
        self.suites = Suites.load(file) if file.is_file() else None
        self.reload()
        config = self.subject.model.config
        self.kind = "gemma" if "gemma" in config.model_type else "llama"
        self.bos = config.bos_token_id if self.kind == "gemma" else None
        self.cached: dict[tuple[Any, ...], Statistics] = {}
        started = time.perf_counter()
        self.references = {
            length: reference(self.subject.model, self.scored(length), self.batch(length))
            for length in LENGTHS
        }
        self.held_out = self.held_out_statistics()
        self.opening = time.perf_counter() - started

    def reload(self) -> None:
        self.subject = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        model = AutoModelForCausalLM.from_pretrained(self.arguments.model, dtype=torch.bfloat16)
        self.subject = Subject(model.to(self.device))

    def knows(self, each: Row) -> bool:
        """Whether a row is of this kind of model, and its documents are here."""
        if each.peer and self.arguments.peers is None:
            return False
        there = SCORED if self.suites is None else int(self.suites.place.max()) + 1
        return each.only in ("", self.kind) and (each.suites <= SCORED or there > SCORED)

    def attempt(self, each: Row) -> None:
        try:
            self.write(self.measure_peer(each) if each.peer else self.measure(each))
        except (Exception, SystemExit) as error:  # the other rows are worth having
            traceback.print_exc()
            self.write({"row": each.name, "error": f"{type(error).__name__}: {error}"[:500]})
            self.reload()

    def measure(self, each: Row) -> dict[str, Any]:
        started, made, held_out = time.perf_counter(), Quantized(), self.held_out
        with self.subject.restored():
            if each.transform:
                inputs = self.statistics(row("16-bit inputs", SIXTEEN))
                transform(self.subject, each.transform, inputs)
                equivalent = self.scores(LENGTHS[:1])[LENGTHS[0]]
                held_out = self.held_out_statistics()
            if not each.sixteen_bits:
                original = None
                if each.propagation == "original" and not each.output_range:
                    original = self.statistics(each)
                before = time.perf_counter()
                windows = self.windows(each.text)
                made = quantize_model(self.subject, each, windows, self.batch(), original, held_out)
                self.synchronize()
            else:
                before = time.perf_counter()
            quantized = time.perf_counter()
            found = self.record(each, made, self.scores())
            scored = time.perf_counter()
            found |= self.answers(each)
        if each.transform:
            found["equivalent"] = equivalent.perplexity
            self.reload()
        return found | {
            "seconds": {
                "statistics": before - started, "layers": quantized - before,
                "windows": scored - quantized, "suites": time.perf_counter() - scored,
            }
        }  # fmt: skip

    def measure_peer(self, each: Row) -> dict[str, Any]:
        """What another tool makes of the same model and windows, read by our loader."""
        assert each.peer is not None
        python = peers.environment(self.arguments.peers)
        with tempfile.TemporaryDirectory() as work:
            tokens, folder = Path(work, "tokens.safetensors"), Path(work, "quantized")
            save_file({"tokens": self.windows(each.text).contiguous()}, tokens)
            script = Path(__file__).with_name("peer.py")
            inputs = self.arguments.model, tokens, folder, self.batch()
            took = peers.run([str(each) for each in (python, script, *each.peer, *inputs)])
            model = load_model(folder, self.device)
        if not each.sixteen_bits:
            rounded = Subject(model)
            windows = self.windows(each.text)[:1]
            quantize_model(
                rounded, each, windows, 1, original_statistics(rounded, each, windows, 1), ()
            )
        found = self.record(each, Quantized(), self.scores(model=model))
        found |= self.answers(each, model)
        bits = 4 + 16 / each.scheme.group_size  # symmetric, a 16-bit scale a group
        seconds = {"statistics": 0.0, "layers": took["wall"]["quantize"]}
        return found | {"bits": bits, "seconds": seconds}

    def statistics(self, each: Row) -> Statistics:
        """Of the model as it is; those of an untransformed one are kept for other rows."""
        scheme = each.scheme
        rounds = scheme.activations, scheme.inner, scheme.fp8_max, scheme.power_of_two
        key = each.text, each.scales_text, each.weighting, scheme.activation_range, *rounds
        if each.transform or key not in self.cached:
            scales = None
            if each.scales_text:
                other = row("scales", scheme.model_dump(), text=each.scales_text)
                scales = {name: own.magnitudes for name, own in self.statistics(other).items()}
            windows = self.windows(each.text)
            own = original_statistics(self.subject, each, windows, self.batch(), scales)
            if each.transform:
                return own
            while len(self.cached) > 2:
                self.cached.pop(next(iter(self.cached)))
            self.cached[key] = own
        return self.cached[key]

    def held_out_statistics(self) -> tuple[Statistics, ...]:
        """Of 16-bit inputs that no Hessian has seen, with plain norms and with equal ones."""
        rows = [row("held out", SIXTEEN, weighting=weighting) for weighting in ("none", "unit")]
        windows = self.windows("held-out")
        return tuple(original_statistics(self.subject, r, windows, self.batch()) for r in rows)

    def windows(self, text: str) -> Tensor:
        """Windows to calibrate, spread evenly over a stream. [windows, length]"""
        return _spread(self.cut(text, self.length), self.samples)

    def scored(self, length: int) -> Tensor:
        return _spread(self.cut("test", length), self.most)

    def cut(self, text: str, length: int) -> Tensor:
        stream = self.streams[text]
        windows = stream[: len(stream) // length * length].view(-1, length)
        if self.bos is None:
            return windows
        return torch.cat([torch.full((len(windows), 1), self.bos), windows], 1)

    def batch(self, length: int | None = None) -> int:
        return max(1, self.at_once // (length or self.length))

    def scores(
        self, lengths: tuple[int, ...] = LENGTHS, model: Any = None
    ) -> dict[int, WindowScores]:
        """The token after a window's first is the first predicted."""
        first = 1 if self.bos is None else 2
        model = model or self.subject.model
        return {
            length: score_windows(
                model, self.scored(length), self.references[length], first, self.batch(length)
            )
            for length in lengths
        }

    def answers(self, each: Row, model: Any = None) -> dict[str, Any]:
        """Of a row's suites, as one digit a document."""
        count = self.arguments.documents or each.suites
        if not each.suites or self.suites is None:
            return {}
        limits = dict.fromkeys(self.suites.names, count) | {"mmlu": max(1, count // SUBJECTS)}
        model = model or self.subject.model
        found = score_suites(model, self.suites, limits, 2 * self.at_once)
        answers = {name: "".join(map(str, own)) for name, own in found.items()}
        return {"answers": answers, "documents": count}

    def record(self, each: Row, made: Quantized, scores: dict[int, WindowScores]) -> dict[str, Any]:
        errors = dict(zip(("own", "held_out", "held_out_even"), made.mean_errors(), strict=False))
        found: dict[str, Any] = {"row": each.name, "part": each.part, "bits": made.bits}
        found |= {"errors": errors, "layers": {n: _short(e) for n, e in made.errors.items()}}
        for length, own in scores.items():
            columns = vars(own).items()
            found[str(length)] = {name: _short(column) for name, column in columns}
        show = {f"perplexity {length}": own.perplexity for length, own in scores.items()}
        show |= {f"KL {length}": float(np.mean(own.divergence)) for length, own in scores.items()}
        cells = [f"{key} {value:.4f}" for key, value in (show | errors).items()]
        print(f"{each.name:40} {'  '.join(cells)}", flush=True)
        return found

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def write(self, record: dict[str, Any]) -> None:
        """One line, by one call: workers share the file."""
        card = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        settings = {"model": self.arguments.model.name, "torch": torch.__version__, "card": card}
        settings |= {"samples": self.samples, "length": self.length, "bos": self.bos}
        line = json.dumps({**record, "settings": settings, "opening": self.opening}) + "\n"
        with self.arguments.out.open("ab", buffering=0) as out:
            out.write(line.encode())


def _spread(windows: Tensor, count: int | None) -> Tensor:
    """So many windows at equal distances; all, where there are fewer or None is asked for."""
    count = max(1, min(len(windows), count or len(windows)))
    return windows[torch.arange(count) * len(windows) // count]


def _short(numbers: Any) -> list[float]:
    return [float(f"{number:.6g}") for number in numbers]


if __name__ == "__main__":
    main()
