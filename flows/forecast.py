"""What a release will do and about how long it takes, said before it starts: from the recipe, the
checkpoint's headers, and the rate of a product that is measured here and now.

    seconds of a stage = 2 · tokens · weights that a token is multiplied with · _OVERHEAD / rate

and for layers the products of the column loop and of the Hessian's factors. Nothing is loaded or
tokenised: texts count by their characters, four a token (one, for vocabularies of bytes), official
suites by the mean length of their documents. What cannot be known yet (a model on the hub, a data
set that is not read) is named and not counted. The rate is the best of several: of a machine that
has nothing else to do. Right within a factor of two there (`docs/log.md`).
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpq_core import corpus
from dpq_core.device import resolve_device
from dpq_core.errors import InputError
from dpq_core.families import FAMILIES, members_of
from dpq_core.reader import CheckpointReader, model_type_of
from dpq_core.recipe import Recipe, TextDataset
from dpq_core.roofline import synchronize
from dpq_core.suites import python_docs
from dpq_core.suites.mirrored import MIRRORED
from flows.progress import shown_time

_OVERHEAD = 1.5  # of a forward pass over its products: attention, norms, softmax, rounding
_PER_TOKEN = 4  # characters; 1 where the vocabulary is one of bytes
_BYTES = 1000  # a vocabulary below this is one of bytes
_CORPUS = "python_docs"
# Of a document with all its answers, as the model reads them: mean of 300 documents.
_CHARACTERS = {
    "hellaswag": 793,
    "lambada_openai": 324,
    "boolq": 665,
    "arc_easy": 633,
    "piqa": 314,
    "winogrande": 210,
    "arc_challenge": 711,
    "openbookqa": 298,
    "mmlu": 475,
    "wikitext": 20_800,
}
# Texts of the papers' perplexity, by hub id, configuration and split.
_HUB = {("Salesforce/wikitext", "wikitext-2-raw-v1", "test"): 1_290_590}
_TEXTS = (".txt", ".json", ".jsonl", ".gz")
_TOKENS, _SIDE = 256, 1024  # of the product that is timed, at most
_TYPES = (torch.bfloat16, torch.float32)
_TIMING = 0.3  # s, for each of two types


@dataclass(frozen=True)
class Stage:
    """seconds: None where it is not known."""

    name: str
    what: str
    seconds: float | None

    @property
    def line(self) -> str:
        about = (
            "time not known yet" if self.seconds is None else f"about {shown_time(self.seconds)}"
        )
        return f"  {self.name:<10} {self.what}: {about}"


@dataclass(frozen=True)
class _Shapes:
    """Of a checkpoint. token: weights that a token is multiplied with; blocks: those of the blocks.
    hessians: sum of the squared widths of all inputs. loops: products of quantizing all layers."""

    token: int
    blocks: int
    hessians: int
    loops: float
    layers: int
    width: int
    vocabulary: int


def forecast(recipe: Recipe, measured: bool = True) -> list[str]:
    """Lines for a person. measured: a release; else what `dpq quantize` does of it."""
    shapes = None
    with suppress(InputError, OSError):  # preflight says what is wrong with it, or fetches it
        shapes = _shapes(Path(recipe.model.id))
    with suppress(InputError):
        return list(_lines(recipe, shapes, measured))
    return []  # a device that is not here: preflight says so


def _lines(recipe: Recipe, shapes: _Shapes | None, measured: bool) -> Iterator[str]:
    rate = _rate(shapes, resolve_device(recipe.execution.device))
    size = f"{shapes.token / 1e6:,.1f} million weights" if shapes else "its size is not known yet"
    yield f"{_short(recipe.model.id)}: {size}; products here: {rate / 1e9:,.1f} GFLOP/s"
    stages = [*_quantization(recipe, shapes, rate)]
    if measured:
        asked = _evaluation(recipe, shapes, rate)
        stages = [asked, *stages, replace(asked, name="candidate", what="the same")]
    yield from (stage.line for stage in stages)
    if measured:
        yield f"  {'verdict':<10} {_gates(recipe)}"
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    if shapes is None:
        yield "how long: known when the model is here"
    else:
        store = recipe.execution.store
        yield f"about {shown_time(sum(known))} in all; what is in {store} is not made again"
    if (load := os.getloadavg()[0]) > 0.5 * _cores():
        yield f"this machine is busy (load {load:.1f}, {_cores()} cores): it will take longer"


def _evaluation(recipe: Recipe, shapes: _Shapes | None, rate: float) -> Stage:
    section = recipe.evaluation
    asked = {suite: _suite_characters(suite, section.limit) for suite in section.suites}
    if section.perplexity:
        dataset = section.perplexity.dataset
        asked = {f"perplexity on {_label(dataset)}": _characters(dataset), **asked}
    what = ", ".join(asked)
    if shapes is None:
        return Stage("baseline", what, None)
    read = sum(characters or 0 for characters in asked.values())
    tokens = read / (1 if shapes.vocabulary < _BYTES else _PER_TOKEN)
    what += f"; {_count(tokens)} tokens"
    if unknown := [name for name, characters in asked.items() if characters is None]:
        what += f", and those of {', '.join(unknown)}, which are not counted here"
    return Stage("baseline", what, 2 * tokens * shapes.token * _OVERHEAD / rate)


def _quantization(recipe: Recipe, shapes: _Shapes | None, rate: float) -> Iterator[Stage]:
    section, scheme = recipe.calibration, recipe.scheme
    tokens = section.samples * section.sequence_length
    passes = 2 if scheme.activations == "static" and section.hessian_inputs == "fp8" else 1
    what = f"{section.samples} windows of {section.sequence_length} tokens"
    what += ", twice" if passes == 2 else ""
    threads = recipe.execution.threads_per_worker
    alone = rate * min(1, threads / _cores()) if torch.accelerator.is_available() is False else rate
    taken = layers = None
    if shapes:
        products = passes * shapes.blocks * _OVERHEAD + shapes.hessians
        taken = 2 * tokens * products / alone
        layers = shapes.loops / min(rate, alone * recipe.execution.workers)
    yield Stage("calibrate", what, taken)
    of = f"{shapes.layers} layers, " if shapes else ""
    yield Stage("quantize", f"{of}{scheme.method}, {scheme.bits} bits", layers)


def _gates(recipe: Recipe) -> str:
    gates, percent = recipe.gates, " %" if recipe.gates.mode == "relative" else ""
    parts = []
    if recipe.evaluation.perplexity:
        parts.append(f"perplexity rises by less than {gates.perplexity_increase:g}{percent}")
    if recipe.evaluation.suites:
        points = percent or " points"
        parts.append(f"accuracy falls by less than {gates.accuracy_drop:g}{points}")
    parts += [f"speed on {', '.join(recipe.benchmark.devices)}"] if recipe.benchmark.devices else []
    parts += [f"exports {', '.join(recipe.export)}"] if recipe.export else []
    parts += ["repair where a gate is missed, which takes longer"] if recipe.repair.enabled else []
    return "; ".join([*parts, f"registered as {recipe.registered_name}"])


def _characters(dataset: TextDataset) -> float | None:
    """Of a data set's texts, where that can be known without reading them."""
    if dataset.path == _CORPUS:
        with suppress(ValueError):
            return float(sum(map(len, corpus.documents(dataset.split))))
    files = dataset.data_files
    paths = [Path(name) for name in ([files] if isinstance(files, str) else files or [])]
    if paths and all(path.is_file() and path.suffix in _TEXTS for path in paths):
        return float(sum(map(_unpacked, paths)))
    return _HUB.get((dataset.path, dataset.name or "", dataset.split))


def _unpacked(path: Path) -> int:
    """Bytes of a file; of a gzip file as its last four bytes have them."""
    if path.suffix != ".gz":
        return path.stat().st_size
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


def _label(dataset: TextDataset) -> str:
    files = dataset.data_files
    names = [files] if isinstance(files, str) else files or [dataset.path]
    return ", ".join(Path(name).name for name in names)


def _short(model: str) -> str:
    """A folder as seen from here, where it is below."""
    here = Path.cwd()
    return str(Path(model).relative_to(here)) if Path(model).is_relative_to(here) else model


def _suite_characters(suite: str, limit: int | None) -> float | None:
    """Of the documents that are scored, with their answers."""
    if suite == _CORPUS:
        asked = python_docs.questions()[:limit]
        return float(sum(len(q["context"] + choice) for q in asked for choice in q["choices"]))
    if suite not in _CHARACTERS:
        return None
    row = MIRRORED[suite]
    documents = row.splits[row.scored]
    return float(_CHARACTERS[suite] * (documents if limit is None else min(documents, limit)))


def _shapes(folder: Path) -> _Shapes:
    """From the headers of a checkpoint's files.

    Raises:
        CheckpointError, OSError: no such folder, or no checkpoint in it.
    """
    reader = CheckpointReader(folder)
    family = FAMILIES[model_type_of(folder)]
    found = {name: reader.shape_and_type(name)[0] for name in reader.names}
    matrices = {name: shape for name, shape in found.items() if len(shape) == 2}
    rows, width = matrices[f"{family.embedding}.weight"]
    linears = {
        name.removesuffix(".weight"): shape
        for name, shape in matrices.items()
        if name.startswith(f"{family.blocks}.") and name.endswith(".weight")
    }
    blocks = sum(out * features for out, features in linears.values())
    by_block: dict[str, list[str]] = {}
    for name in linears:
        number, _, path = name.removeprefix(f"{family.blocks}.").partition(".")
        by_block.setdefault(f"{family.blocks}.{number}", []).append(path)
    hessians = sum(
        linears[f"{block}.{group[0]}"][1] ** 2
        for block, paths in by_block.items()
        for group in members_of(family.groups, sorted(paths))
    )
    loops = sum(2.0 * out * n**2 + 2.0 * n**3 for out, n in linears.values())
    return _Shapes(blocks + rows * width, blocks, hessians, loops, len(linears), width, rows)


def _rate(shapes: _Shapes | None, device: torch.device) -> float:
    """Operations a second of a product with the model's width, at most 1024: of BF16, or of FP32
    where that is faster, by all cores."""
    side = min(shapes.width, _SIDE) if shapes else _SIDE
    return 4 * _TOKENS * side**2 / min(_seconds(side, dtype, device) for dtype in _TYPES)


def _seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Least time of a product [tokens, side] · [side, 2 side]."""
    left = torch.ones(_TOKENS, side, dtype=dtype, device=device)
    right = torch.ones(side, 2 * side, dtype=dtype, device=device)
    least, end = math.inf, time.monotonic() + _TIMING
    while time.monotonic() < end or least == math.inf:
        synchronize(device)
        started = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        least = min(least, time.perf_counter() - started)
    return least


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _count(number: float) -> str:
    """`531 thousand`: two digits are known, or three."""
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.0f}"
