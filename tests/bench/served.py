"""Whether it pays to calibrate a real model as it is served: scales of activations from other texts
than Hessians, and a quarter of the Hessians' windows from conversations or from WikiText.

    python tests/bench/served.py MODEL [--data ../shared/data] [--samples 32] [--length 512]
                                    [--windows 12] [--rows c4 c4/web web c4+wiki c4+chat]

A row is `HESSIANS` or `HESSIANS/SCALES`; `c4+chat` has a quarter of its windows from WebQuestions
as the model's chat template writes them, a question and its answer. Scored as by `in_16_bits.py` on
windows of WikiText-2's test split, which chose nothing.
"""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from in_16_bits import C4, Differences, In16Bits, parser_of, texts_of, with_error
from torch import Tensor

from dpq_core.checkpoint.native import load_quantized
from dpq_core.data.conversations import written
from dpq_core.data.texts import calibration_windows, interleaved, opening_token
from dpq_core.model.inputs import ModelInputs, apart, batches_of
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

_FILES = {
    "c4": C4,
    "wiki": "wikitext2_raw_train_slice/train_first1MB.jsonl.gz",
}
_QUESTIONS = "web_questions/train.jsonl.gz"
_BATCH, _SHARE = 4, 4  # windows a forward pass; one of so many is of the second data set


class Texts:
    """Windows by the name of what they are of."""

    def __init__(self, data: Path, tokenizer: Any, length: int) -> None:
        self._data, self._tokenizer, self._length = data, tokenizer, length
        self._opening = opening_token(tokenizer, "auto")

    def windows(self, name: str, samples: int) -> Tensor:
        """[at most samples, length] int64."""
        main, _, beside = name.partition("+")
        if beside:
            few = samples // _SHARE
            return interleaved([self.windows(main, samples - few), self.windows(beside, few)])
        sizes = samples, self._length
        return calibration_windows(self._texts(name), self._tokenizer, *sizes, self._opening)

    def _texts(self, name: str) -> list[str]:
        if name in _FILES:
            return list(texts_of(self._data / _FILES[name]))
        with gzip.open(self._data / _QUESTIONS, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        if name == "web":
            return [row["question"] for row in rows]
        said = [
            [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": ", ".join(row["answers"])},
            ]
            for row in rows
        ]
        return written(said, self._tokenizer, _QUESTIONS)


def inputs_of(row: str, texts: Texts, samples: int) -> list[ModelInputs]:
    """A row's windows in batches, each for what it is counted for."""
    hessians, _, scales = row.partition("/")
    windows = texts.windows(hessians, samples)
    if not scales:
        return batches_of(windows, _BATCH)
    return apart({"hessians": windows, "scales": texts.windows(scales, samples)}, _BATCH)


def main() -> None:
    parser = parser_of(__doc__, samples=32, windows=12)
    parser.add_argument("--rows", nargs="+", default=["c4", "c4/web", "web", "c4+wiki", "c4+chat"])
    arguments = parser.parse_args()
    section = CalibrationSection(
        dataset=TextDataset(path="none"),
        samples=arguments.samples,
        sequence_length=arguments.length,
        batch_size=_BATCH,
    )
    original = In16Bits(arguments.model, arguments.data, arguments.windows, _BATCH)
    texts = Texts(arguments.data, original.tokenizer, arguments.length)
    differences = Differences()
    print("| row | increase | KL | less the first's |\n| --- | --- | --- | --- |")
    for name in arguments.rows:
        inputs = inputs_of(name, texts, arguments.samples)
        with tempfile.TemporaryDirectory() as work:
            out = Path(work, "out")
            quantize_checkpoint(arguments.model, out, inputs, Scheme(), section, {})
            found = original.scored(load_quantized(out))
        print(
            f"| {name} | {found.perplexity - original.scores.perplexity:+.3f} |"
            f" {np.mean(found.divergence):.4f} | {with_error(differences.of(found), '+.4f')} |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
