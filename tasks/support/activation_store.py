"""Hidden states before a block, leaf by leaf (`dpq_core.calibration.reduction_tree`): in memory
where the same task runs the next block on them, in the store before every block that another task
begins with.

Those in the store are kept until nothing needs them. Those that a run misses are computed again,
from the nearest before them that are there or from the inputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from safetensors.torch import load_file, save_file

from dpq_core.calibration.reduction_tree import leaves_of
from dpq_core.checkpoint.native import load_layer
from dpq_core.digests import digest
from dpq_core.layer.records import QuantizedLinear
from dpq_core.model.inputs import Batch, ModelInputs, purpose_of
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import Recipe
from infra.store import ArtifactRef, Store, StoreError
from tasks.support.model import Model, stream_of
from tasks.support.stages import computed_by
from tasks.support.tokenized_data import load_inputs
from tasks.support.worker import Worker
from tasks.support.write_behind import WriteBehind

_FILE = "hidden.safetensors"


def load_leaves(recipe: Recipe, windows: ArtifactRef, store: Store) -> list[Sequence[ModelInputs]]:
    """What the recipe calibrates on, by leaf."""
    inputs = load_inputs(windows, store, recipe.calibration.batch_size)
    uncounted = sum(purpose_of(each) == "unseen" for each in inputs)
    return leaves_of(inputs, len(inputs[0]["input_ids"]), uncounted)


@dataclass(frozen=True)
class HiddenStates:
    """Before all blocks of a model, on a recipe's windows.

    layers: the quantized layers of all blocks that they have passed, and of the next, unless with
    `propagation: original`; else empty. every: they are stored before the blocks that this divides.
    """

    recipe: Recipe
    model: Model
    windows: ArtifactRef
    layers: Mapping[str, ArtifactRef]
    store: Store
    worker: Worker
    behind: WriteBehind
    every: int = 1
    # Leaf → a block and its batches before it: not to be stored, or not yet.
    _in_memory: dict[int, tuple[int, list[Batch]]] = field(default_factory=dict)

    @cached_property
    def leaves(self) -> list[Sequence[ModelInputs]]:
        return load_leaves(self.recipe, self.windows, self.store)

    @cached_property
    def base(self) -> dict[str, Any]:
        """All that they depend on, but for place and layers: of a store key."""
        return {
            **computed_by("statistics", self.worker.arithmetic),
            "model": self.model.digest,
            "windows": self.windows.sha256,
            "batch_size": self.recipe.calibration.batch_size,
        }

    @cached_property
    def stream(self) -> StreamedModel:
        """The model, for whoever runs a block on them."""
        return self._new_stream()

    def original(self) -> "HiddenStates":
        """Those of the 16-bit model, the same that `propagation: original` has."""
        return replace(self, layers={}, _in_memory={})

    def prepare(self, block: int, leaves: Iterable[int]) -> None:
        """Have those before a block that are missing. Each block on the way is loaded once."""
        reached = {leaf: self._nearest(block, leaf) for leaf in leaves}
        if all(at == block for at in reached.values()):
            return
        stream = self._new_stream()  # the other one may have a block loaded
        if unbegun := [leaf for leaf, at in reached.items() if at < 0]:
            with stream.embedding() as begun:
                for leaf in unbegun:
                    self.put(0, leaf, [begun(inputs) for inputs in self.leaves[leaf]])
        for index in range(max(min(reached.values()), 0), block):
            passing = [leaf for leaf, at in reached.items() if at <= index]
            with stream.block(index, self.load_layers(index)):
                for leaf in passing:
                    batches = self.get(index, leaf)
                    stream.advance(batches)
                    passed = range(max(index + 1 - self.every, 0), index + 1)
                    self.put(index + 1, leaf, batches, passed)

    def get(self, block: int, leaf: int) -> list[Batch]:
        """A leaf's batches before a block."""
        if (found := self._found(block, leaf)) is None:
            self.prepare(block, [leaf])
            found = self._found(block, leaf)
        if found is None:
            raise StoreError(f"hidden states before block {block} are missing")
        return found

    def put(
        self, block: int, leaf: int, batches: Sequence[Batch], spent: Iterable[int] = ()
    ) -> None:
        """Keep a leaf's batches before a block; whatever was kept of the leaf in memory goes.

        Args:
            spent: blocks before which they can go from the store once these are there.
        """
        kept = (block, list(batches))
        self._in_memory[leaf] = kept
        if block % self.every:
            return
        hidden = {str(n): batch.hidden.contiguous() for n, batch in enumerate(batches)}

        def store() -> None:
            key = self._key(block, leaf)
            self.store.get_or_make("hidden", key, lambda to: save_file(hidden, to / _FILE))
            if self._in_memory.get(leaf) is kept:
                del self._in_memory[leaf]
            for each in spent:
                self.remove(each, leaf)

        self.behind(store)

    def remove(self, block: int, leaf: int) -> None:
        """Delete from the store what nothing will read again. Missing is fine."""
        if spent := self.store.find("hidden", self._key(block, leaf)):
            self.store.remove(spent)

    def _found(self, block: int, leaf: int) -> list[Batch] | None:
        kept = self._in_memory.get(leaf)
        if kept and kept[0] == block:
            return kept[1]
        artifact = self.store.find("hidden", self._key(block, leaf))
        try:
            stored = load_file(self.store.open(artifact) / _FILE) if artifact else None
        except (StoreError, FileNotFoundError):  # another run had no more use for it just now
            return None
        if stored is None:
            return None
        return [Batch.of(each, stored[str(n)]) for n, each in enumerate(self.leaves[leaf])]

    def _nearest(self, block: int, leaf: int) -> int:
        """The last block up to this one before which they are there; -1: none."""
        kept = self._in_memory.get(leaf)
        in_memory = kept[0] if kept and kept[0] <= block else -1
        for n in range(block, in_memory, -1):
            if self.store.find("hidden", self._key(n, leaf)):
                return n
        return in_memory

    def _key(self, block: int, leaf: int) -> str:
        passed = {name for n in range(block if self.layers else 0) for name in self._linears(n)}
        upstream = [artifact.sha256 for name, artifact in self.layers.items() if name in passed]
        return digest({**self.base, "before_block": block, "leaf": leaf, "layers": upstream})

    def _new_stream(self) -> StreamedModel:
        return stream_of(self.recipe, self.model, self.worker.device)

    def _linears(self, block: int) -> list[str]:
        return list(self.stream.linears(block))

    def load_layers(self, block: int) -> dict[str, QuantizedLinear]:
        """A block's, those that there are."""
        names = self._linears(block) if self.layers else []
        return {
            name: load_layer(self.store.open(self.layers[name]))
            for name in names
            if name in self.layers
        }
