"""What a release will do and about how long it takes, said before it starts: from the recipe, the
checkpoint's headers, and two rates that are measured here and now.

    seconds of a stage = tokens · (2 · weights / product rate + _PASSES · outputs / element rate)

weights: those that a token is multiplied with; outputs: of all linears, which norms, attention,
activations and rounding go over several times. Layers take the products of the column loop and of
the Hessian's factors. Nothing is loaded or tokenised: texts count by their characters, four a token
(one, for vocabularies of bytes), official suites by the mean length of their documents. What cannot
be known yet (a model on the hub, a data set that is not read) is named and not counted. Rates are
the best of several, of a core, times the cores: of a machine that has nothing else to do. Right
within a factor of two there (`docs/log.md`).
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpq_core.benchmark.roofline import synchronize
from dpq_core.data import python_corpus
from dpq_core.data.mirrored_suites import MIRRORED
from dpq_core.errors import InputError
from dpq_core.evaluation.suites import python_docs
from dpq_core.machine.device import resolve_device
from dpq_core.model.streaming import StreamedModel
from dpq_core.paths import is_file
from dpq_core.recipe import Recipe, TextDataset
from flows.cli.progress import shown_time
from tasks.support.worker import workers_here

_PASSES = 12  # over each output of a linear, in a forward pass
_PER_TOKEN = 4  # characters; 1 where the vocabulary is one of bytes
_BYTES = 1000  # a vocabulary below this is one of bytes
_CORPUS = "python_docs"
# Of a document with all its answers, what these share counted once: mean of 300 documents.
_CHARACTERS = {
    "hellaswag": 382,
    "lambada_openai": 324,
    "boolq": 668,
    "arc_easy": 220,
    "piqa": 223,
    "winogrande": 136,
    "arc_challenge": 250,
    "openbookqa": 119,
    "mmlu": 471,
    "wikitext": 20_000,
}
# Texts of the papers' perplexity, by hub id, configuration and split.
_HUB = {("Salesforce/wikitext", "wikitext-2-raw-v1", "test"): 1_290_590}
_TEXTS = (".txt", ".json", ".jsonl", ".gz")
_TOKENS, _SIDE = 256, 1024  # of the product that is timed, at most
_TIMING = 0.2  # s, for each of three rates


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
class _Rates:
    """What this machine does in a second: operations of a forward pass's products and of FP32 ones,
    and elements that are multiplied by a number."""

    products: float
    fp32: float
    elements: float

    def forward(self, weights: int, outputs: int) -> float:
        """Seconds a token."""
        return 2 * weights / self.products + _PASSES * outputs / self.elements


@dataclass(frozen=True)
class _Shapes:
    """Sizes of a checkpoint. blocks, head: weights that a token is multiplied with. outputs: of the
    blocks' linears. before: the weights of a block that are run before each of its inputs, summed.
    hessians: sum of the squared widths of their inputs. loops: operations of quantizing all layers.
    """

    blocks: int
    head: int
    outputs: int
    before: int
    hessians: int
    loops: float
    layers: int
    width: int
    vocabulary: int


def forecast(recipe: Recipe, measured: bool = True) -> list[str]:
    """Lines for a person. measured: a release; else what `dpq quantize` does of it."""
    shapes = None
    with suppress(InputError, OSError):  # preflight says what is wrong with it, or fetches it
        shapes = _shapes(Path(recipe.model.id), recipe.model.trust_remote_code)
    with suppress(InputError):
        return list(_lines(recipe, shapes, measured))
    return []  # a device that is not here: preflight says so


def _lines(recipe: Recipe, shapes: _Shapes | None, measured: bool) -> Iterator[str]:
    rates = _rates(shapes, resolve_device(recipe.execution.device))
    size = (
        f"{(shapes.blocks + shapes.head) / 1e6:,.1f} million weights"
        if shapes
        else "its size is not known yet"
    )
    yield f"{_short(recipe.model.id)}: {size}; products here: {rates.products / 1e9:,.0f} GFLOP/s"
    stages = [*_quantization(recipe, shapes, rates)]
    if measured:
        asked = _evaluation(recipe, shapes, rates)
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


def _evaluation(recipe: Recipe, shapes: _Shapes | None, rates: _Rates) -> Stage:
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
    outputs = shapes.outputs + shapes.vocabulary
    return Stage("baseline", what, tokens * rates.forward(shapes.blocks + shapes.head, outputs))


def _quantization(recipe: Recipe, shapes: _Shapes | None, rates: _Rates) -> Iterator[Stage]:
    section, scheme = recipe.calibration, recipe.scheme
    tokens = section.all_samples * section.sequence_length
    passes = 2 if scheme.activations == "static" and section.hessian_inputs == "fp8" else 1
    what = f"{section.samples} windows of {section.sequence_length} tokens"
    what += ", twice" if passes == 2 else ""
    what += ", group by group" if section.propagation == "groups" else ""
    taken = layers = None
    if shapes:
        share = min(1.0, recipe.execution.threads_per_worker / _cores())  # of the machine
        forward, both = rates.forward(shapes.blocks, shapes.outputs), 1 + (section.correction > 0)
        times = float(passes)
        if section.propagation == "groups":  # as far as each input, then through the block
            times = (passes + both - 1) * shapes.before / shapes.blocks + both
        moments = both * 2 * shapes.hessians / rates.products
        taken = tokens * (times * forward + moments) / share
        layers = shapes.loops / rates.fp32 / min(1.0, share * workers_here(recipe.execution))
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
    if gates.divergence is not None:
        parts.append(f"divergence below {gates.divergence:g} nats a token")
    if gates.top1_agreement is not None:
        parts.append(f"the same most likely token at {gates.top1_agreement:.4g} of all or more")
    if gates.flips is not None:
        parts.append(f"fewer than {gates.flips:g} % of the answers changed")
    if gates.confidence is not None:
        parts.append(f"shown at {gates.confidence:.4g}")
    parts += [f"speed on {', '.join(recipe.benchmark.devices)}"] if recipe.benchmark.devices else []
    parts += [f"exports {', '.join(recipe.export)}"] if recipe.export else []
    parts += ["repair where a gate is missed, which takes longer"] if recipe.repair.enabled else []
    return "; ".join([*parts, f"registered as {recipe.registered_name}"])


def _characters(dataset: TextDataset) -> float | None:
    """Characters of a data set's texts, where that can be known without reading them."""
    if dataset.path == _CORPUS:
        with suppress(ValueError):
            return float(sum(map(len, python_corpus.documents(dataset.split))))
    files = dataset.data_files
    paths = [Path(name) for name in ([files] if isinstance(files, str) else files or [])]
    if paths and all(is_file(path) and path.suffix in _TEXTS for path in paths):
        return float(sum(map(_unpacked, paths)))
    return _HUB.get((dataset.path, dataset.name or "", dataset.split))


def _unpacked(path: Path) -> int:
    """Bytes of a file; of a gzip file as its last four bytes have them."""
    size = path.stat().st_size
    if path.suffix != ".gz" or size < 4:  # damaged: preflight says so
        return size
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
    """Characters of the documents that are scored, with their answers."""
    if suite == _CORPUS:
        asked = python_docs.questions()[:limit]
        return float(sum(len("".join([q["context"], *q["choices"]])) for q in asked))
    if suite not in _CHARACTERS:
        return None
    row = MIRRORED[suite]
    documents = row.splits[row.scored]
    return float(_CHARACTERS[suite] * (documents if limit is None else min(documents, limit)))


def _shapes(folder: Path, trust_remote_code: bool) -> _Shapes:
    """From its configuration, without weights.

    Raises:
        InputError, OSError: no such folder, no checkpoint in it, or one that is not quantized.
    """
    stream = StreamedModel(folder, trust_remote_code=trust_remote_code)
    rows, width = stream.parameters[f"{stream.anatomy.parts.embedding}.weight"]
    sides = [
        (linear.out_features, linear.in_features)
        for block in range(stream.block_count)
        for linear in stream.linears(block).values()
    ]
    hessians = sum(
        stream.linears(block)[first].in_features ** 2
        for block in range(stream.block_count)
        for first, *_ in stream.groups(block)
    )
    weights, outputs = sum(out * n for out, n in sides), sum(out for out, _ in sides)
    before = sum(_before_each_step(stream, block) for block in range(stream.block_count))
    loops = sum(2.0 * out * n**2 + 2.0 * n**3 for out, n in sides)
    known = weights, rows * width, outputs, before, hessians, loops, len(sides), width, rows
    return _Shapes(*known)


def _before_each_step(stream: StreamedModel, block: int) -> int:
    """Weights of a block's linears that are run before each of its steps, summed."""
    linears, run, before = stream.linears(block), 0, 0
    for groups in stream.steps(block):
        before += run
        run += sum(linears[name].weight.numel() for group in groups for name in group)
    return before


def _rates(shapes: _Shapes | None, device: torch.device) -> _Rates:
    """The rates of products of the model's width (at most 1024), in BF16, or in FP32 where that is
    faster."""
    side = min(shapes.width, _SIDE) if shapes else _SIDE
    cores, threads = (_cores() if device.type == "cpu" else 1), torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other where something else runs
    try:
        operations = 4 * _TOKENS * side**2
        taken = {t: _seconds(side, t, device) for t in (torch.bfloat16, torch.float32)}
        values = torch.ones(_TOKENS, side, dtype=torch.bfloat16, device=device)
        elements = values.numel() / _least(lambda: values.mul(0.5), device)
    finally:
        torch.set_num_threads(threads)
    fp32 = cores * operations / taken[torch.float32]
    return _Rates(cores * operations / min(taken.values()), fp32, cores * elements)


def _seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a product [tokens, side] · [side, 2 side]."""
    left = torch.ones(_TOKENS, side, dtype=dtype, device=device)
    right = torch.ones(side, 2 * side, dtype=dtype, device=device)
    return _least(lambda: torch.mm(left, right), device)


def _least(run: Callable[[], object], device: torch.device) -> float:
    """Least time of several runs, after one that does not count."""
    run()
    least, end = math.inf, time.monotonic() + _TIMING
    while time.monotonic() < end or least == math.inf:
        synchronize(device)
        started = time.perf_counter()
        run()
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
