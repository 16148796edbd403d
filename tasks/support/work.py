"""What a task takes of its worker, for runners that ask."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

from dpq_core.footprint import layer_bytes
from dpq_core.model.plan import PlannedLayer, readers_of_one_input
from infra.store import ArtifactRef

FIRST = 1 << 60  # priority of what others wait for: more than any layer's weights

Part = Literal["magnitudes", "statistics"]  # what is summed, in the order of the passes

_Made = TypeVar("_Made")


@runtime_checkable
class Work(Protocol):
    """A parameter that says so. memory: bytes. priority: what has more goes first."""

    @property
    def memory(self) -> int: ...

    @property
    def priority(self) -> int: ...


@dataclass(frozen=True)
class Readers:
    """The layers that read one input, which one task quantizes: their Hessian is read and
    factorised once. Each is stored when it is finished. corrected: from statistics with S."""

    layers: tuple[PlannedLayer, ...]
    corrected: bool = False

    @property
    def title(self) -> str:
        """`model.layers.0.self_attn.q_proj, k_proj, v_proj`."""
        first, *others = (layer.name for layer in self.layers)
        return ", ".join([first, *(name.rpartition(".")[2] for name in others)])

    @property
    def statistics(self) -> str:
        """Name of the input; empty for an embedding."""
        return self.layers[0].statistics

    def given(self, statistics: Mapping[str, ArtifactRef]) -> ArtifactRef | None:
        """Their input's statistics; None for an embedding, which needs none."""
        return statistics[self.statistics] if self.statistics else None

    @property
    def memory(self) -> int:
        """One is quantized at a time."""
        return max(layer_bytes(layer, self.corrected) for layer in self.layers)

    @property
    def priority(self) -> int:
        """Weights, so that the larger goes first."""
        return sum(layer.weights for layer in self.layers)


def readers_of(layers: Iterable[PlannedLayer], corrected: bool) -> list[Readers]:
    """Layers of a plan by input, the most work first."""
    together = [Readers(each, corrected) for each in readers_of_one_input(layers)]
    return sorted(together, key=lambda each: -each.priority)


@dataclass(frozen=True)
class Passes:
    """The blocks first … last - 1, calibrated one after the other. every: blocks that such a task
    has, but for the last one. memory: bytes that this takes. shared: others have made sums.

    inputs: of one block, those that have their turn; None: all. place: among the run's `Passes`, in
    blocks or turns. ends: nothing after it reads hidden states before its blocks.
    """

    first: int
    last: int
    every: int
    memory: int
    shared: bool = False
    inputs: tuple[str, ...] | None = None
    place: int = 0
    ends: bool = True
    priority: int = FIRST

    @property
    def title(self) -> str:
        """`block 3`, `blocks 0 to 7`, `block 3, inputs of model.layers.3.mlp.down_proj`."""
        if self.inputs:
            return f"block {self.first}, inputs of {self.inputs[0]}"
        several = self.last - self.first > 1
        return f"blocks {self.first} to {self.last - 1}" if several else f"block {self.first}"


@dataclass(frozen=True)
class Share:
    """The leaves first … last - 1 of a block's calibration, and what is summed over them.

    memory: bytes that this takes. inputs: as `Passes` has them.
    """

    block: int
    part: Part
    first: int
    last: int
    memory: int
    inputs: tuple[str, ...] | None = None
    priority: int = FIRST


@dataclass(frozen=True)
class Made(Generic[_Made]):
    """What a task made. device_peak: the most bytes of its device that it had, if anybody knows."""

    made: _Made
    device_peak: int | None
