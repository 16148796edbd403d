"""Calibration statistics of blocks: of all samples, or of shares of them by tasks of their own.

Sums are made by the tree of `dpq_core.calibration.reduction_tree`, so that they have the same bytes
however many tasks share the samples. Artifacts: `statistics`, one for each shared input; `partial`,
the sum of a node of the tree, kept until the block's statistics are there; `hidden`, see
`tasks/support/activation_store.py`. What a killed run leaves of the last two is waste that nobody
looks for: `dpq store gc`.

A task passes a run of blocks (`execution.blocks_per_task`): hidden states stay in its memory from
one to the next, a block's statistics are hashed and written while the next block computes, and
all stay in memory for layers that this process quantizes (`tasks/support/kept_statistics.py`). With
`propagation: groups` a task has some inputs of one block, and all layers that are run before them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from functools import cache, cached_property, partial
from typing import Any, get_args

from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from dpq_core.calibration.reduction_tree import Node, summed
from dpq_core.calibration.statistics import (
    BlockMagnitudes,
    BlockPasses,
    BlockStatistics,
    InputRounding,
    Step,
    TokenWeights,
    add_magnitudes,
    add_statistics,
    block_passes,
    completed,
)
from dpq_core.digests import digest
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.kv_cache import CACHE_MAXIMA, CacheMaxima
from dpq_core.machine.device import freed_memory_kept
from dpq_core.model.kv_cache import cached_attention
from dpq_core.recipe import Recipe
from infra.store import ArtifactRef, Store, StoreError
from tasks.support import kept_statistics, tensor_files
from tasks.support.activation_store import HiddenStates
from tasks.support.model import Model
from tasks.support.progress import parts_of_step
from tasks.support.tensor_files import saver
from tasks.support.work import Made, Part, Passes, Share
from tasks.support.worker import this_worker
from tasks.support.write_behind import WriteBehind


@task(name="calibrate", task_run_name="calibrate {passes.title}", cache_policy=NO_CACHE)
def calibrate(
    recipe: Recipe,
    model: Model,
    windows: ArtifactRef,
    layers: dict[str, ArtifactRef],
    passes: Passes,
) -> Made[dict[str, ArtifactRef]]:
    """Statistics of the blocks' inputs, by the shared input's name; of the sums that it takes,
    those that `calibrate_share` has made are not made again.

    Args:
        layers: the quantized layers that feed them, unless with `propagation: original`; else
            empty.
    """
    found: dict[str, ArtifactRef] = {}
    made: list[Future[dict[str, ArtifactRef]]] = []
    with (
        this_worker(recipe.execution).watched() as device_peak,
        WriteBehind() as behind,
        ExitStack() as before,
    ):
        hidden = _hidden(recipe, model, windows, layers, behind, passes.every)
        for block in range(passes.first, passes.last):
            with ExitStack() as this:
                work = _Calibration(recipe, block, hidden, passes.inputs)
                if (there := work.found()) is None:
                    this.enter_context(work.lease(work.wanted))  # forward passes are of all names
                    there = work.found()
                if there is None:
                    place = passes.place + block - passes.first
                    made.append(work.make(None if passes.shared else place))
                    this.callback(work.finish, passes)
                    this.callback(behind.wait)  # what is entered last happens first
                found |= there or {}
                before.close()  # of the block before, which was written meanwhile
                before.push(this.pop_all())
        before.close()
        for each in made:
            found |= each.result()
        return Made(found, device_peak())


@task(
    name="calibrate share",
    task_run_name="calibrate block {share.block}: {share.part}, leaves {share.first}-{share.last}",
    cache_policy=NO_CACHE,
)
def calibrate_share(
    recipe: Recipe,
    model: Model,
    windows: ArtifactRef,
    layers: dict[str, ArtifactRef],
    share: Share,
) -> int | None:
    """Leave sums of a share of the samples in the store, for `calibrate`, unless it is done.
    Returns the most bytes of the device that it had."""
    with this_worker(recipe.execution).watched() as device_peak, WriteBehind() as behind:
        hidden = _hidden(recipe, model, windows, layers, behind, 1)
        work = _Calibration(recipe, share.block, hidden, share.inputs)
        nodes = work.root.within(share.first, share.last)
        with work.lease([work.key(share.part, node) for node in nodes]):
            work.make_partial(share.part, nodes)
        return device_peak()


@task(name="calibrated", task_run_name="is block {block} calibrated", cache_policy=NO_CACHE)
def is_calibrated(
    recipe: Recipe,
    model: Model,
    windows: ArtifactRef,
    layers: dict[str, ArtifactRef],
    block: int,
    inputs: tuple[str, ...] | None = None,
) -> bool:
    """Whether `calibrate` would find everything: asked of a worker, whose arithmetic the keys
    name."""
    with WriteBehind() as behind:
        hidden = _hidden(recipe, model, windows, layers, behind, 1)
        return _Calibration(recipe, block, hidden, inputs).found() is not None


def parts(recipe: Recipe) -> list[Part]:
    """What the shares of a block sum, one after the other: each for all leaves before the next."""
    rounding = InputRounding.of(recipe.scheme, recipe.calibration)
    first = (rounding and rounding.static) or recipe.calibration.activations is not None
    return ["magnitudes", "statistics"] if first else ["statistics"]


def load_statistics(artifact: ArtifactRef, store: Store) -> InputStatistics:
    """Inverse of how `calibrate` stores them."""
    if there := kept_statistics.take(artifact):
        return there
    return InputStatistics.from_tensors(tensor_files.load(store.open(artifact)))


def load_maxima(artifact: ArtifactRef, store: Store) -> CacheMaxima:
    """The largest keys and values beside the statistics of what is made of them."""
    return CacheMaxima(*tensor_files.load_small(store.open(artifact), CACHE_MAXIMA))


def _hidden(
    recipe: Recipe,
    model: Model,
    windows: ArtifactRef,
    layers: dict[str, ArtifactRef],
    behind: WriteBehind,
    every: int,
) -> HiddenStates:
    execution = recipe.execution
    store, worker = Store(execution.scratch or execution.store), this_worker(execution)
    return HiddenStates(recipe, model, windows, layers, store, worker, behind, every)


class _Calibration:
    """The calibration of one block, or of some of its inputs."""

    def __init__(
        self,
        recipe: Recipe,
        block: int,
        hidden: HiddenStates,
        inputs: tuple[str, ...] | None,
    ) -> None:
        self.store = hidden.store
        self._recipe, self._block, self._hidden, self._inputs = recipe, block, hidden, inputs
        self._original = hidden.original() if recipe.calibration.correction else None
        self._step: Callable[[], None] = lambda: None
        self._rounding = InputRounding.of(recipe.scheme, recipe.calibration)
        self._weights = TokenWeights.of(recipe.calibration)
        self._base = {
            **hidden.base,
            "rounding": self._rounding.key() if self._rounding else None,
            "weights": asdict(self._weights),
            "layers": [artifact.sha256 for artifact in hidden.layers.values()],
            **({"shifted": True} if self._original else {}),
        }
        if inputs is None:
            inputs = tuple(first for first, *_ in hidden.stream.groups(block))
        self._cache = recipe.scheme.kv_cache == "fp8"
        beside = (self._cache and cached_attention(hidden.stream, block)) or ("", "")
        self.wanted = {
            name: digest(self._base | {"input": name} | self._looked_at(name == beside[1]))
            for name in inputs
        }

    @cached_property
    def root(self) -> Node:
        return Node(0, len(self._hidden.leaves))

    def key(self, part: Part, node: Node) -> str:
        """The key of the artifact `partial`."""
        of: dict[str, Any] = {"inputs": self._inputs} if self._inputs else {}
        of |= self._looked_at(self._cache)
        return digest({**self._base, "block": self._block, "part": part, "node": node, **of})

    @staticmethod
    def _looked_at(cache: bool) -> dict[str, Any]:
        """The part of a key that says that the largest keys and values are in it."""
        return {"cache": True} if cache else {}

    def lease(self, keys: Any) -> AbstractContextManager[None]:
        """Held by who makes what these are the keys of."""
        return self.store.lease(f"calibrate-{digest(keys)}")

    def found(self) -> dict[str, ArtifactRef] | None:
        """The block's statistics, if all are there."""
        found = {name: self.store.find("statistics", key) for name, key in self.wanted.items()}
        present = {name: artifact for name, artifact in found.items() if artifact}
        return present if len(present) == len(found) else None

    def make(self, place: int | None) -> "Future[dict[str, ArtifactRef]]":
        """The block's statistics, which are being written. place: in the stage; None: tasks have
        made sums of them, whose progress is seen."""
        if place is not None:
            batches = len(parts(self._recipe)) * sum(map(len, self._hidden.leaves))
            self._step = parts_of_step("calibrate", place, batches)
        with self._passes(self.root) as passes:
            magnitudes = self._all_magnitudes(passes)
            statistics = completed(self._statistics(self.root, magnitudes, passes), magnitudes)
        return self._hidden.behind(partial(self._write, statistics))

    def _write(self, statistics: BlockStatistics) -> dict[str, ArtifactRef]:
        made = {
            name: self.store.get_or_make("statistics", key, saver(statistics[name].tensors()))[0]
            for name, key in self.wanted.items()
        }
        of_artifacts = {artifact: statistics[name] for name, artifact in made.items()}
        kept_statistics.keep(of_artifacts, blocks=self._hidden.every)
        return made

    def finish(self, passes: Passes) -> None:
        """Once the statistics are written: what was kept for them alone is deleted."""
        for part in get_args(Part):
            for node in self.root.tree():
                if spent := self.store.find("partial", self.key(part, node)):
                    self.store.remove(spent)
        if self._block + 1 < passes.last or not passes.ends:
            return
        for leaf in range(self.root.last):
            for block in range(passes.first, passes.last):
                self._hidden.remove(block, leaf)
                if self._original:
                    self._original.remove(block, leaf)

    def make_partial(self, part: Part, nodes: list[Node]) -> None:
        """Sums of nodes, unless they are there, or what they are for (which is looked for last: it
        is made before they are deleted)."""
        missing = [n for n in nodes if not self.store.find("partial", self.key(part, n))]
        if not missing or self.found():
            return
        with self._passes(Node(nodes[0].first, nodes[-1].last)) as passes:
            magnitudes = self._all_magnitudes(passes) if part == "statistics" else None
            for node in missing:
                if part == "magnitudes":
                    make = saver(self._magnitudes(node, passes))
                else:
                    make = saver(_flat(self._statistics(node, magnitudes, passes)))
                self.store.get_or_make("partial", self.key(part, node), make)
                del make  # the sums, before the next node's

    @contextmanager
    def _passes(self, leaves: Node) -> Iterator[Callable[[], BlockPasses]]:
        """The passes over the block, which is loaded when they are first asked for. Every forward
        takes the same temporaries, which are kept from one to the next."""
        with ExitStack() as stack:

            @cache
            def passes() -> BlockPasses:
                stack.enter_context(freed_memory_kept())
                wanted, step = range(leaves.first, leaves.last), None
                self._hidden.prepare(self._block, wanted)
                if self._original:
                    self._original.prepare(self._block, wanted)
                if self._inputs:
                    layers = self._hidden.load_layers(self._block)
                    step = Step(self._inputs, layers, beside=self._original is not None)
                stream, seen_as = self._hidden.stream, (self._rounding, self._weights)
                opened = block_passes(stream, self._block, *seen_as, step=step, cache=self._cache)
                return stack.enter_context(opened)

            yield passes

    def _all_magnitudes(self, passes: Callable[[], BlockPasses]) -> BlockMagnitudes | None:
        """Where there are two passes."""
        return self._magnitudes(self.root, passes) if len(parts(self._recipe)) == 2 else None

    def _magnitudes(self, node: Node, passes: Callable[[], BlockPasses]) -> BlockMagnitudes:
        def leaf(number: int) -> BlockMagnitudes:
            return passes().magnitudes(self._hidden.get(self._block, number), self._step)

        return summed(node, leaf, add_magnitudes, lambda node: self._partial("magnitudes", node))

    def _statistics(
        self, node: Node, magnitudes: BlockMagnitudes | None, passes: Callable[[], BlockPasses]
    ) -> BlockStatistics:
        original = self._recipe.calibration.propagation == "original"
        stream = self._hidden.stream
        head = stream.outside.weight_of(stream.anatomy.parts.head) in self._recipe.layers
        advance = original and self._block + 1 < stream.block_count + head

        def leaf(number: int) -> BlockStatistics:
            block, batches = passes(), self._hidden.get(self._block, number)
            others = self._original.get(self._block, number) if self._original else ()
            made = block.statistics(batches, magnitudes, advance, self._step, others)
            if advance:
                self._hidden.put(self._block + 1, number, batches)
            return made

        def found(node: Node) -> BlockStatistics | None:
            tensors = self._partial("statistics", node)
            return None if tensors is None else _nested(tensors)

        return summed(node, leaf, add_statistics, found)

    def _partial(self, part: Part, node: Node) -> dict[str, Tensor] | None:
        try:
            if artifact := self.store.find("partial", self.key(part, node)):
                return tensor_files.load(self.store.open(artifact))
        except (StoreError, FileNotFoundError):  # another run had no more use for it just now
            pass
        return None


def _flat(statistics: BlockStatistics) -> dict[str, Tensor]:
    return {
        f"{name}/{field}": tensor
        for name, each in statistics.items()
        for field, tensor in each.tensors().items()
    }


def _nested(tensors: dict[str, Tensor]) -> BlockStatistics:
    """Inverse of `_flat`."""
    fields: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        fields.setdefault(name, {})[field] = tensor
    return {name: InputStatistics.from_tensors(each) for name, each in fields.items()}
