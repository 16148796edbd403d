"""Speed of a causal LM on a device: variants of one model, timed side by side in one process.

One generation is `batch` prompts of `prompt_tokens` random tokens and `new_tokens` greedy tokens
after each, with a static KV cache (`dpq_core.serving.decoding`), under CUDA graphs where the device
has them:

    first token   from the prompts on the device to the first new token of every sequence, s
    prefill       batch · prompt_tokens / first token, tokens/s
    step          the other new tokens' time / (new_tokens − 1), s
    decode        batch / step, tokens/s
    memory        weights + KV cache + what a generation took beyond these at its peak, bytes:
                  of the allocator on an accelerator, of the process's resident memory on a CPU

Numbers are medians over `repeats` generations, after one that warms up and tells the memory. The
variants take turns, generation by generation, so that a machine that slows down slows all; where
their weights would not fit together they are loaded one after another, which the result says.
What fails or does not fit at a batch has no number there, and a reason.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from textwrap import shorten
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StaticCache

from dpq_core.benchmark.formats_timed import Source, load_of
from dpq_core.benchmark.roofline import Device, Load, measured_device, synchronize
from dpq_core.errors import InputError, one_line
from dpq_core.kernels.attention import attend_in_groups
from dpq_core.layer.linear import W4A8Linear
from dpq_core.machine.device import out_of_memory
from dpq_core.machine.working_memory import Peak, free_bytes, free_unused, tensor_bytes
from dpq_core.model.context import check_lengths
from dpq_core.serving.decoding import Decoder, generate, static_cache
from dpq_core.serving.runtimes import Chosen, runtime_for

BASELINE, CANDIDATE = "bf16", "w4a8"
RATIO_BATCH = 1
_SAID = 120  # characters of an error
_SHARE = 0.8  # of free memory, that variants may take together

Progress = Callable[[int, int], None]


class Asked(Protocol):
    """What is measured: a recipe's section `benchmark`."""

    @property
    def variants(self) -> Sequence[str]: ...
    @property
    def batches(self) -> Sequence[int]: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def new_tokens(self) -> int: ...
    @property
    def repeats(self) -> int: ...


@dataclass(frozen=True)
class Cell:
    """One variant at one batch; numbers as above, or why there are none. limit: tokens/s of
    decoding that the roofline allows."""

    variant: str
    batch: int
    first_token_seconds: float | None = None
    prefill_tokens_per_second: float | None = None
    step_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    memory_bytes: int | None = None
    limit: float | None = None
    wrong: str = ""


@dataclass(frozen=True)
class Times:
    """What was timed on a device. product_limit: tokens/s that its rate of products allows at any
    batch. notes: what a reader has to know of the numbers. wrong: why there are none."""

    device: str
    hardware: str = ""
    bandwidth: float | None = None
    product_rate: float | None = None
    product_limit: float | None = None
    cells: tuple[Cell, ...] = ()
    notes: tuple[str, ...] = ()
    wrong: str = ""

    def ratio(self) -> float | str:
        """Decoding speed of W4A8 over BF16 at batch 1, or why there is none."""
        if self.wrong:
            return self.wrong
        speeds = []
        for variant in (CANDIDATE, BASELINE):
            wanted = (variant, RATIO_BATCH)
            cell = next((c for c in self.cells if (c.variant, c.batch) == wanted), None)
            if cell is None or cell.decode_tokens_per_second is None:
                why = f": {cell.wrong}" if cell else ""
                return f"{variant} was not measured at batch {RATIO_BATCH}{why}"
            speeds.append(cell.decode_tokens_per_second)
        return speeds[0] / speeds[1]


@dataclass
class _Loaded:
    """A variant on the device; no model where it could not be loaded. By batch, taken: of each
    generation, seconds to its first token and seconds of the others; wrong: why there are none."""

    name: str
    load: Load
    model: Any = None
    weight_bytes: int = 0
    memory: dict[int, int] = field(default_factory=dict)
    taken: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    wrong: dict[int, str] = field(default_factory=dict)


def measure(
    source: Source, asked: Asked, device: torch.device, report: Progress = lambda done, total: None
) -> Times:
    """All variants at all batches; the caller gives this process the whole machine.

    Raises:
        ContextError: a context that the model does not have. VariantError: see `variants`.
    """
    config = source.empty().config.get_text_config()
    check_context(config, asked)
    loads = {variant: load_of(source, variant) for variant in asked.variants}
    rates = measured_device(device)
    rounds, note = _rounds(asked, loads, device)
    notes, done = [note], 0
    cells: list[Cell] = []
    total = len(rounds) * len(asked.batches) * (asked.repeats + 1)

    def step() -> None:
        nonlocal done
        done += 1
        report(done, total)

    for variants in rounds:
        loaded = [_load(source, name, loads[name], device, asked, notes) for name in variants]
        for batch in asked.batches:
            prompts = random_prompts(config.vocab_size, batch, asked.prompt_tokens).to(device)
            _time_batch([each for each in loaded if each.model is not None], prompts, asked, step)
            free_unused(device)
        cells += [_cell(each, batch, asked, rates) for each in loaded for batch in asked.batches]
        del loaded
        free_unused(device)
    cells.sort(key=lambda cell: list(asked.variants).index(cell.variant))
    return Times(
        device.type,
        bandwidth=rates.bandwidth,
        product_rate=rates.product_rate,
        product_limit=rates.product_rate / (2 * max(load.weights for load in loads.values())),
        cells=tuple(cells),
        notes=tuple(notes),
    )


def check_context(config: Any, asked: Asked) -> None:
    """ContextError: prompt and new tokens are more than the model's context."""
    length = asked.prompt_tokens + asked.new_tokens
    check_lengths(config, {"benchmark.prompt_tokens + new_tokens": length})


def random_prompts(vocabulary: int, batch: int, length: int) -> Tensor:
    """Tokens [batch, length], the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, length), generator=generator)


def time_generation(decoder: Decoder, prompts: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and of all others together."""
    decoder.clear()
    synchronize(prompts.device)
    started = time.perf_counter()
    decoder.start(prompts)
    synchronize(prompts.device)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        decoder.step()
    synchronize(prompts.device)
    return first - started, time.perf_counter() - first


def _rounds(
    asked: Asked, loads: dict[str, Load], device: torch.device
) -> tuple[list[list[str]], str]:
    """Variants that are loaded together: all, or each alone; and which of the two. Counted with two
    bytes a weight, which a layer without a kernel takes."""
    largest = max(loads.values(), key=lambda load: load.weights)
    cache = max(asked.batches) * _length(asked) * largest.context_bytes
    needed, free = 2 * largest.weights * len(loads) + cache, free_bytes(device)
    if needed <= _SHARE * free:
        return [list(loads)], "the variants took turns, generation by generation"
    return [[variant] for variant in loads], (
        f"the variants were loaded one after another: together they would take {needed / 1e9:.1f}"
        f" GB, and {free / 1e9:.1f} GB are free"
    )


def _load(
    source: Source, variant: str, load: Load, device: torch.device, asked: Asked, notes: list[str]
) -> _Loaded:
    """A variant on the device, or why not. `notes` gets its runtime, and the layers for which that
    has no kernel."""
    try:
        chosen = None if variant == BASELINE else runtime_for(device)
        model = attend_in_groups(source.build(variant, device, chosen or W4A8Linear))
        _compile(model)
    except Exception as error:  # of one variant: the others go on
        return _Loaded(variant, load, wrong=dict.fromkeys(asked.batches, _said(error)))
    if chosen:
        notes += _about(variant, chosen)
    return _Loaded(variant, load, model, tensor_bytes(model))


def _about(variant: str, chosen: Chosen) -> list[str]:
    about = f", {chosen.runtime.note}" if chosen.runtime.note else ""
    return [f"{variant}: runtime {chosen.runtime.name}{about}"] + [
        f"{variant}: {count} layers without a kernel, computed by the definition: {reason}"
        for reason, count in chosen.refused.items()
    ]


def _compile(model: Any) -> None:
    """Run once what is compiled or loaded at its first use, in no generation's memory."""
    prompts = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    generate(Decoder(model, static_cache(model, 1, 4), 1, graph=False), prompts, 2)


def _time_batch(
    loaded: list[_Loaded], prompts: Tensor, asked: Asked, step: Callable[[], None]
) -> None:
    """Generations of all variants in turn, with one cache. The first round is not timed."""
    batch = len(prompts)
    cache: list[StaticCache] = []
    decoders: dict[str, Decoder] = {}
    for repeat, each in product(range(asked.repeats + 1), loaded):
        try:
            if batch in each.wrong:
                pass
            elif repeat == 0:
                _check_room(each, prompts, asked)
                cache = cache or [static_cache(each.model, batch, _length(asked))]
                with Peak(prompts.device) as peak:
                    graph = prompts.is_cuda
                    decoders[each.name] = Decoder(each.model, cache[0], batch, graph)
                    generate(decoders[each.name], prompts, asked.new_tokens)
                context = batch * _length(asked) * each.load.context_bytes
                each.memory[batch] = each.weight_bytes + context + peak.bytes
            else:
                taken = time_generation(decoders[each.name], prompts, asked.new_tokens)
                each.taken.setdefault(batch, []).append(taken)
        except Exception as error:  # of one variant: the others go on
            each.wrong[batch] = _said(error)
            decoders.pop(each.name, None)
        if each is loaded[-1]:
            step()


def _check_room(each: _Loaded, prompts: Tensor, asked: Asked) -> None:
    """MemoryError where a CPU's memory will not do: its kernel would end the process. An estimate:
    the cache, and the activations of a block in FP32, three wide ones and three narrow."""
    if not prompts.is_cpu:
        return
    config = each.model.config.get_text_config()
    wide = config.hidden_size + config.intermediate_size
    needed = len(prompts) * _length(asked) * each.load.context_bytes
    needed += 3 * 4 * prompts.numel() * wide
    free = free_bytes(prompts.device)
    if needed > free:
        raise MemoryError(
            f"about {needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free"
        )


def _cell(each: _Loaded, batch: int, asked: Asked, rates: Device) -> Cell:
    context = asked.prompt_tokens + asked.new_tokens / 2
    limit = each.load.tokens_per_second(batch, context, rates)
    if batch in each.wrong:
        return Cell(each.name, batch, limit=limit, wrong=each.wrong[batch])
    first = median(first for first, _ in each.taken[batch])
    step = median(others for _, others in each.taken[batch]) / (asked.new_tokens - 1)
    return Cell(
        each.name,
        batch,
        first_token_seconds=first,
        prefill_tokens_per_second=batch * asked.prompt_tokens / first,
        step_seconds=step,
        decode_tokens_per_second=batch / step,
        memory_bytes=each.memory[batch],
        limit=limit,
    )


def _length(asked: Asked) -> int:
    return asked.prompt_tokens + asked.new_tokens


def _said(error: Exception) -> str:
    """Why there is no number, in one line; what nobody foresaw is logged with its traceback."""
    said = shorten(str(error), _SAID)
    if isinstance(error, InputError):
        return one_line(error)
    if out_of_memory(error):
        return f"out of memory: {said}"
    logging.getLogger(__name__).exception("a variant failed")
    return f"failed: {type(error).__name__}: {said}"
