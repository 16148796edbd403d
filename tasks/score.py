"""Run a checkpoint on chunks of what an evaluation asks, a task a portion.

Each chunk's results are stored when it has passed the last block, so that a run that was killed, or
a worker, goes on with the chunks that are missing; and they are the same for any number of them
and of workers (`dpq_core.evaluation.scorer`).
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.evaluation.head import head_tiles
from dpq_core.evaluation.room import Sizes
from dpq_core.evaluation.scorer import last_states
from dpq_core.evaluation.subject import Subject as Opened
from dpq_core.evaluation.subject import streamable, subject_of
from dpq_core.layer.linear import W4A8Linear
from dpq_core.machine.device import whole_machine
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import Recipe
from dpq_core.serving.runtimes import runtime_for
from infra.memory import available_memory
from infra.store import Store
from tasks.support.chunks import ChunkRef, Comparison, Kept, Portion, Subject, loader_of
from tasks.support.progress import progress_of
from tasks.support.worker import this_worker, workers_here

_SHARE = 8  # part of the memory that is there which hidden states may take
_ON_CLUSTER = 16


@task(name="score", task_run_name="{portion.title} of {subject.role}", cache_policy=NO_CACHE)
def score(recipe: Recipe, subject: Subject, portion: Portion, comparison: Comparison) -> None:
    """Have the results of its chunks in the store.

    Raises:
        NotFiniteError: a model in 16 bits overflows. TimeoutError: `evaluation.timeout` has passed;
            what was scored is kept.
    """
    store, worker = Store(recipe.execution.store), this_worker(recipe.execution)
    kept = Kept(store, subject, comparison, worker.arithmetic)
    todo = [chunk for chunk in portion.chunks if kept.missing(chunk)]
    if not todo:
        return
    load = loader_of(todo, store)
    with whole_machine(parts=workers_here(recipe.execution)), ExitStack() as heads:
        model = _opened(recipe, subject, worker.device, portion.resident)
        theirs = None
        if (reference := comparison.reference) and any(chunk.compared for chunk in todo):
            stream = _opened(recipe, reference, worker.device).stream
            theirs = heads.enter_context(head_tiles(stream))
        hands = [[chunk] for chunk in todo] if portion.resident else [todo]
        title, blocks = f"{portion.title} of {subject.role}", model.stream.block_count
        step = _stepper(title, hands, blocks, recipe.evaluation.timeout)
        for hand in hands:
            with kept.alone(hand) as missing:
                chunks = [load(each) for each in missing]
                states = last_states(model, chunks, step) if chunks else []
                with head_tiles(model.stream) as tiles:
                    for each in zip(missing, chunks, states, strict=True):
                        kept.keep(*each, tiles, theirs)
            step()


def _opened(
    recipe: Recipe, subject: Subject, device: torch.device, resident: bool = False
) -> Opened:
    return subject_of(
        subject.folder,
        device,
        resident=resident,
        trust_remote_code=recipe.model.trust_remote_code,
        source=subject.source,
        linear=runtime_for(device) if subject.served else W4A8Linear,
    )


def memory_for_states(recipe: Recipe) -> int:
    """Bytes that the hidden states of a worker's chunks may take."""
    return available_memory() // (_SHARE * _workers(recipe))


def _workers(recipe: Recipe) -> int:
    """That portions are made for. Of a cluster nobody here knows how many it has."""
    return _ON_CLUSTER if recipe.execution.dask_address else workers_here(recipe.execution)


def portions_of(recipe: Recipe, subject: Subject, chunks: Sequence[ChunkRef]) -> list[Portion]:
    """Chunks in order, cut into parts of about the same size: one a worker, or more where not all
    tokens of a worker can be in hand at a time."""
    if not chunks:
        return []
    stream = StreamedModel(subject.folder, trust_remote_code=recipe.model.trust_remote_code)
    sizes, workers = Sizes.of(stream, recipe.layers), _workers(recipe)
    resident = sizes.resident or not streamable(subject.folder, subject.source)
    tokens = sum(chunk.tokens for chunk in chunks)
    in_hand = sizes.tokens_in_hand(memory_for_states(recipe))
    size = -(-tokens // workers)
    if not resident:
        size = min(size, in_hand)
    found, before = list[list[ChunkRef]](), 0
    for chunk in chunks:
        if before // size >= len(found):
            found.append([])
        found[-1].append(chunk)
        before += chunk.tokens
    several = len(found) > 1
    return [
        Portion(
            title=f"evaluation {number} of {len(found)}" if several else "evaluation",
            chunks=tuple(part),
            resident=resident,
            memory=sizes.bytes_of(max(c.tokens for c in part) if resident else in_hand),
        )
        for number, part in enumerate(found, 1)
    ]


def _stepper(
    title: str, hands: Sequence[Sequence[ChunkRef]], blocks: int, timeout: float | None
) -> Callable[[], None]:
    """To be called after each block and after the head of each hand; it tells how many chunks are
    through, and ends what takes too long.

    Not Prefect's `timeout_seconds`: in a thread it raises wherever the code happens to be, and what
    a library had set for the whole process a moment ago (accelerate, datasets) stays set.
    """
    report = progress_of(title)
    start, done, steps = time.monotonic(), 0, len(hands) * (blocks + 1)
    total = sum(map(len, hands))
    report(0, total)

    def step() -> None:
        nonlocal done
        done += 1
        report(total * done / steps, total)
        passed = time.monotonic() - start
        if timeout is not None and passed > timeout and done < steps:
            raise TimeoutError(
                f"{done * total // steps} of {total} chunks were scored in {passed:.0f} s, and"
                f" evaluation.timeout is {timeout:g} s: raise it, and run again: what was scored is"
                " kept"
            )

    return step
