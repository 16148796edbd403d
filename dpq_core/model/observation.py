"""What a forward of a small instance shows: which linears read the same input, and what is read
outside the blocks.

Two linears share their input when they are given the same memory, of the same version: whatever
views of it they are given, the numbers are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from dpq_core.digests import digest
from dpq_core.errors import first_line
from dpq_core.model.anatomy import (
    Anatomy,
    ArchitectureError,
    Parts,
    check_blocks,
    experts_of,
    kinds_of,
    linears_of,
    parts_of,
    wildcarded,
)
from dpq_core.model.empty import building, empty_like
from dpq_core.model.families import Groups
from dpq_core.model.small import random_tensors, small_config, tokens

_AT_LEAST = 4  # blocks: some settings turn at every fourth


def anatomy_of(model: Any) -> Anatomy:
    """A model's anatomy, from its structure and a forward of a small instance of it. Computed once
    for a class and a configuration; about a second.

    model: of `empty.empty_of`; needs no memory.

    Raises:
        ArchitectureError: what stands in the way.
    """
    key = identity(model)
    with _FINDING:
        if key not in _FOUND:
            _FOUND[key] = _found(model)
        return _FOUND[key]


def identity(model: Any) -> str:
    """A name for a class and its configuration."""
    return digest([type(model).__qualname__, model.config.to_json_string(use_diff=False)])


_FINDING, _FOUND = Lock(), dict[str, Anatomy]()


def _found(model: Any) -> Anatomy:
    parts = parts_of(model)
    check_blocks(model, parts)
    kinds = kinds_of(model, parts)
    small = small_of(model, parts)
    fill(small, random_tensors(small))
    seen = _observe(small, parts)
    like = dict(zip(reversed(kinds_of(small, parts)), reversed(seen.groups()), strict=True))
    for number, kind in enumerate(kinds):
        if kind not in like:
            why = f"{parts.blocks}.{number} has no like in a small instance of the configuration"
            raise ArchitectureError.of(model, why)
    return Anatomy(
        parts,
        before=tuple(seen.before),
        after=tuple(seen.after),
        groups=tuple(like[kind] for kind in kinds),
        tuple_length=seen.tuple_length,
    )


def small_of(model: Any, parts: Parts, separate: bool = True) -> Any:
    """A small instance of a model, without memory, with at least one block of each kind.

    Raises:
        ArchitectureError: transformers does not make one.
    """
    kinds = kinds_of(model, parts)
    first = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    blocks = min(len(kinds), max(_AT_LEAST, 1 + max(first.values())))
    try:
        return empty_like(model, small_config(model.config, blocks), separate)
    except Exception as error:  # of any architecture's constructor
        why = f"no small instance of the configuration can be made ({first_line(error)})"
        raise ArchitectureError.of(model, why) from error


def fill(model: Any, tensors: dict[str, Tensor]) -> None:
    """Give an empty model its tensors; what it does not name stays."""
    with building:
        model.load_state_dict(tensors, strict=False, assign=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings:
        head.weight = embedding.weight


@dataclass
class _Seen:
    """inputs: of each block, what each linear was given, by the order of calls; the tensors are
    kept, so that no memory is given twice. reached: blocks so far."""

    model: Any
    blocks: nn.ModuleList
    inputs: list[list[tuple[str, Tensor]]] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    running: bool = False
    tuple_length: int | None = None

    def enter(self, *_: Any) -> None:
        self.inputs.append([])
        self.running = True

    def leave(self, _: nn.Module, __: Any, output: Any) -> None:
        self.running = False
        self.tuple_length = len(output) if isinstance(output, tuple) else None

    def linear(self, name: str, _: nn.Module, arguments: tuple[Any, ...], named: Any) -> None:
        self.inputs[-1].append((name, arguments[0] if arguments else named["input"]))

    def outside(self, name: str, *_: Any) -> None:
        if self.running or 0 < len(self.inputs) < len(self.blocks):
            why = f"{name} is read between blocks, which are run one at a time"
            raise ArchitectureError.of(self.model, why)
        place = self.after if self.inputs else self.before
        if name not in place:
            place.append(name)

    def groups(self) -> list[Groups]:
        pairs = zip(self.blocks, self.inputs, strict=True)
        return [_groups(self.model, block, inputs) for block, inputs in pairs]


@torch.no_grad()
def _observe(model: Any, parts: Parts) -> _Seen:
    """Run a filled small instance once.

    Raises:
        ArchitectureError: it does not run, or its blocks are not run in order, each by itself.
    """
    seen = _Seen(model, model.get_submodule(parts.blocks))
    with _hooked(model, parts, seen):
        try:
            model(input_ids=tokens(), use_cache=False)
        except ArchitectureError:
            raise
        except Exception as error:  # of any architecture's forward
            why = f"a small instance of the configuration does not run ({first_line(error)})"
            raise ArchitectureError.of(model, why) from error
    if len(seen.inputs) != len(seen.blocks):
        why = f"{len(seen.inputs)} of {len(seen.blocks)} modules of {parts.blocks} are run"
        raise ArchitectureError.of(model, why)
    return seen


@contextmanager
def _hooked(model: Any, parts: Parts, seen: _Seen) -> Iterator[None]:
    handles = []
    for block in seen.blocks:
        handles += [block.register_forward_pre_hook(seen.enter)]
        handles += [block.register_forward_hook(seen.leave)]
        for name in linears_of(block):
            see = partial(seen.linear, name)
            linear = block.get_submodule(name)
            handles += [linear.register_forward_pre_hook(see, with_kwargs=True)]
    known = (parts.embedding, parts.head)
    for name, module in model.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        if own and name not in known and not name.startswith(f"{parts.blocks}."):
            handles += [module.register_forward_pre_hook(partial(seen.outside, name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(model: Any, block: nn.Module, inputs: list[tuple[str, Tensor]]) -> Groups:
    """Linears by what they were given, in the order of calls, experts as one.

    Raises:
        ArchitectureError: a linear that is not called once.
    """
    called = [name for name, _ in inputs]
    wild = partial(wildcarded, experts_of(block))
    reached = {wild(name) for name in called}
    for name in linears_of(block):
        if called.count(name) > 1 or wild(name) not in reached:
            times = called.count(name)
            why = f"linear {name} of {type(block).__name__} is called {times} times for a block"
            raise ArchitectureError.of(model, why)
    shared: dict[tuple[Any, ...], list[str]] = {}
    for name, x in inputs:
        key = (x.data_ptr(), x.numel(), x.shape[-1], x.stride(-1), x.dtype, x._version)
        shared.setdefault(key, []).append(wild(name))
    groups: list[tuple[str, ...]] = []
    for names in shared.values():
        if tuple(names) not in groups:
            groups.append(tuple(names))
    return tuple(groups)
