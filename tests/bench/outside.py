"""Output head and embedding in few bits: what that costs and saves on a real model.

    PYTHONPATH=tests python tests/bench/outside.py MODEL [--data ../shared/data] [--samples 32]
                        [--length 512] [--windows 32] [--native CHECKPOINT] [--out ROWS.jsonl]
                        [--only NAME ...]

Calibrated on C4, scored on windows of 512 tokens that are spread over WikiText-2's test split, by
the product's own scorer from checkpoints as they are written. CHECKPOINT: `dpq quantize`'s, whose
blocks and scheme are taken; without it blocks are quantized here, by the default scheme. A row:
what of the blocks is quantized, and what of the rest, on the model as it is (`both`: one weight,
tied) or on a copy whose head has a weight of its own (`head`, `embedding`). Of each: perplexity's
increase; KL(p16 || p) a token, and its difference from the same blocks with the rest in 16 bits,
window by window, ± its standard error; bytes of the files, and bits of them for each weight that
the model has.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from in_16_bits import parser_of, scored_windows, texts_of
from torch import nn
from transformers import AutoModelForCausalLM

from dpq_core.calibration.statistics import InputRounding, TokenWeights, calibrate_block
from dpq_core.checkpoint.bytes_by_part import TIED, bytes_by_part
from dpq_core.checkpoint.native import QuantizedCheckpoint
from dpq_core.checkpoint.writing import copy_side_files, write_checkpoint
from dpq_core.data.texts import calibration_windows, opening_token
from dpq_core.evaluation.divergence import divergence
from dpq_core.evaluation.forest import chunks_of
from dpq_core.evaluation.head import head_tiles
from dpq_core.evaluation.requests import asked_of_windows
from dpq_core.evaluation.scorer import answers, last_states, scores_of
from dpq_core.evaluation.subject import subject_of
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.quantize import quantize_or_keep
from dpq_core.layer.records import QuantizedLinear
from dpq_core.layer.shared_input import SharedInput
from dpq_core.model.inputs import batches_of
from dpq_core.model.plan import PlannedLayer, plan_layers
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme
from tasks.support.model import load_tokenizer

CALIBRATION = "c4_sample/c4_train_00000_first.jsonl.gz"
SCORED = "wikitext2_raw_test/test.jsonl.gz"
CHOICES = ("w8a16", "w8a8", "w4a8", "w4a8-g32")


@dataclass(frozen=True)
class Row:
    """blocks: quantized, or in 16 bits. part: `both`, `head`, `embedding`; empty: neither."""

    blocks: bool
    part: str = ""
    choice: str = ""

    @property
    def name(self) -> str:
        blocks = "blocks W4A8" if self.blocks else "blocks 16 bits"
        return f"{blocks}, {self.part} {self.choice}" if self.part else f"{blocks}, rest 16 bits"


ROWS = [
    Row(True),
    *(Row(True, "both", choice) for choice in CHOICES),
    *(Row(True, "head", choice) for choice in ("w8a16", "w8a8", "w4a8")),
    *(Row(True, "embedding", choice) for choice in ("w8a16", "w4a8")),
    *(Row(False, "both", choice) for choice in CHOICES),
]


class Bench:
    """A model that is calibrated and quantized once, its parts outside of the blocks row by row."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.folder, self.work = arguments.model, work
        tokenizer = load_tokenizer(self.folder)
        self.section = CalibrationSection(
            dataset=TextDataset(path="none"),
            samples=arguments.samples,
            sequence_length=arguments.length,
            batch_size=4,
        )
        opening = opening_token(tokenizer, self.section.bos)
        texts = list(texts_of(arguments.data / CALIBRATION))
        windows = calibration_windows(
            texts, tokenizer, arguments.samples, arguments.length, opening
        )
        scored = list(texts_of(arguments.data / SCORED))
        self.windows = scored_windows(scored, tokenizer, opening, arguments.windows)
        self.chunks = list(chunks_of(asked_of_windows(self.windows)))
        self.original = subject_of(self.folder)
        self.states = last_states(self.original, self.chunks)
        with head_tiles(self.original.stream) as tiles:
            self.nats = self.nats_of(tiles, self.states)
        self.layers = dict[str, QuantizedLinear]()
        self.scheme = Scheme()
        if arguments.native:
            native = QuantizedCheckpoint(arguments.native)
            self.scheme = native.scheme
            self.layers = {name: native.layer(name) for name in native.shapes}
        self.head_inputs = self.calibrated(windows)

    def calibrated(self, windows: Any) -> InputStatistics:
        """Quantize the blocks, unless they are there, and calibrate the head."""
        stream = StreamedModel(self.folder)
        tied = stream.outside.weight_of(stream.anatomy.parts.head)
        plan = plan_layers(stream, self.scheme, {tied: "w4a8"})
        batches = stream.begin(batches_of(windows, self.section.batch_size))
        seen = InputRounding.of(self.scheme, self.section), TokenWeights.of(self.section)
        given = bool(self.layers)
        for block in range(plan.blocks):
            if given and block < stream.block_count:
                with stream.block(block):
                    stream.advance(batches)
                continue
            found = calibrate_block(stream, block, batches, *seen, advance=True)
            if block == stream.block_count:
                break
            inputs = {name: SharedInput(each) for name, each in found.items()}
            for layer in plan.of_block(block):
                weight = stream.reader.tensor(f"{layer.name}.weight")
                self.layers[layer.name] = quantize_or_keep(
                    weight, inputs[layer.statistics], layer.scheme, 0
                )
        return found[stream.anatomy.parts.head]

    def nats_of(self, tiles: Any, states: Any) -> np.ndarray[Any, Any]:
        """Of each window."""
        scores = [scores_of(tiles, *each) for each in zip(self.chunks, states, strict=True)]
        return -np.array([total for total, _ in answers(scores, len(self.windows))])

    def untied(self) -> Path:
        """A copy whose head has a weight of its own."""
        folder = self.work / "untied"
        if not folder.exists():
            model = AutoModelForCausalLM.from_pretrained(self.folder)
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
            model.config.tie_word_embeddings = False
            folder.mkdir()
            copy_side_files(self.folder, folder)
            model.save_pretrained(folder)
        return folder

    def written(self, row: Row, folder: Path) -> float:
        """The row's checkpoint; CPU seconds of what is outside of the blocks."""
        alone = row.part in ("head", "embedding")
        stream = StreamedModel(self.untied() if alone else self.folder)
        parts = stream.anatomy.parts
        name = parts.head if row.part == "head" else parts.embedding
        choices = {} if row.blocks else dict.fromkeys(self.layers, "bf16")
        plan = plan_layers(stream, self.scheme, choices | ({name: row.choice} if row.part else {}))
        taken = [0.0]

        def layer(full_name: str) -> QuantizedLinear:
            planned = next(each for each in plan.layers if each.name == full_name)
            if not planned.outside and row.blocks:
                return self.layers[full_name]
            started = time.process_time()
            made = self.made(stream, planned)
            taken[0] += (time.process_time() - started) * bool(planned.outside)
            return made

        folder.mkdir()
        write_checkpoint(folder, stream.reader, stream.dtype, plan, self.scheme, layer, {})
        return taken[0]

    def made(self, stream: StreamedModel, planned: PlannedLayer) -> QuantizedLinear:
        weight = stream.reader.tensor(f"{planned.name}.weight")
        seen = SharedInput(self.head_inputs) if planned.statistics else None
        if not planned.outside:  # kept in 16 bits
            seen = SharedInput(InputStatistics.even(planned.features))
        return quantize_or_keep(weight, seen, planned.scheme, 0)

    def measure(self, row: Row) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self.work) as place:
            folder = Path(place, "checkpoint")
            seconds = self.written(row, folder)
            subject, checkpoint = subject_of(folder, resident=True), QuantizedCheckpoint(folder)
            states = last_states(subject, self.chunks)
            with head_tiles(subject.stream) as ours, head_tiles(self.original.stream) as theirs:
                nats = self.nats_of(ours, states)
                apart = [
                    divergence(theirs, old.hidden, ours, new.hidden)
                    for old, new in zip(self.states, states, strict=True)
                ]
            parts, model = bytes_by_part(checkpoint), checkpoint.empty_model()
            weights = sum(parameter.numel() for parameter in model.parameters())
            if TIED in parts:  # two parameters without memory, one weight
                weights -= model.get_output_embeddings().weight.numel()
        kl = np.concatenate([each.nats.numpy() for each in apart])
        agree = np.concatenate([each.agree.numpy() for each in apart])
        return {
            "row": row.name,
            "bytes": parts,
            "bits": 8 * sum(parts.values()) / weights,
            "perplexity": self.perplexity(nats),
            "increase": self.perplexity(nats) - self.perplexity(self.nats),
            "kl": kl.reshape(len(self.windows), -1).mean(1).tolist(),  # all windows are as long
            "agreement": 100 * float(agree.mean()),
            "seconds": seconds,
        }

    def perplexity(self, nats: np.ndarray[Any, Any]) -> float:
        return float(np.exp(nats.sum() / (self.windows[:, 1:].numel())))


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    by_name = {row["row"]: np.array(row["kl"]) for row in rows}
    yield "| row | bits, all weights | MB | increase | KL | KL of the rest | agreement | CPU s |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        kl, same = np.array(row["kl"]), row["row"].partition(",")[0] + ", rest 16 bits"
        more = kl - by_name.get(same, np.zeros_like(kl))  # 16 bits: no divergence
        error = more.std(ddof=1) / np.sqrt(len(more))
        megabytes = sum(row["bytes"].values()) / 1e6
        yield (
            f"| {row['row']} | {row['bits']:.2f} | {megabytes:.1f} | {row['increase']:+.3f} |"
            f" {kl.mean():.4f} | {more.mean():+.5f} ± {error:.5f} | {row['agreement']:.2f} |"
            f" {row['seconds']:.0f} |"
        )


def main() -> None:
    parser = parser_of(__doc__, samples=32, windows=32)
    parser.add_argument("--native", type=Path, help="a native checkpoint of the model")
    parser.add_argument("--out", type=Path, help="rows as JSON lines; those there are kept")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    arguments = parser.parse_args()
    out, rows = arguments.out, list[dict[str, Any]]()
    if out and out.is_file():
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    there = {row["row"] for row in rows}
    wanted = [each for each in ROWS if arguments.only is None or each.name in arguments.only]
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(arguments, Path(work))
        print(f"16 bits: perplexity {bench.perplexity(bench.nats):.3f}", file=sys.stderr)
        for each in (row for row in wanted if row.name not in there):
            rows.append(bench.measure(each))
            print(list(table(rows))[-1], file=sys.stderr, flush=True)
            if out:
                out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
