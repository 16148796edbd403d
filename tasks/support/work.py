"""What a task takes of its worker, for runners that ask."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from dpq_core.footprint import layer_bytes
from dpq_core.model.plan import PlannedLayer, readers_of_one_input

FIRST = 1 << 60  # priority of what others wait for: more than any layer's weights

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
    factorised once. Each is stored when it is finished."""

    layers: tuple[PlannedLayer, ...]

    @property
    def title(self) -> str:
        """`model.layers.0.self_attn.q_proj, k_proj, v_proj`."""
        first, *others = (layer.name for layer in self.layers)
        return ", ".join([first, *(name.rpartition(".")[2] for name in others)])

    @property
    def statistics(self) -> str:
        """Name of the input."""
        return self.layers[0].statistics

    @property
    def memory(self) -> int:
        """One is quantized at a time."""
        return max(map(layer_bytes, self.layers))

    @property
    def priority(self) -> int:
        """Weights, so that the larger goes first."""
        return sum(layer.weights for layer in self.layers)


def readers_of(layers: Iterable[PlannedLayer]) -> list[Readers]:
    """Layers of a plan by input, the most work first."""
    together = [Readers(each) for each in readers_of_one_input(layers)]
    return sorted(together, key=lambda each: -each.priority)


@dataclass(frozen=True)
class Made(Generic[_Made]):
    """What a task made. device_peak: the most bytes of its device that it had, if anybody knows."""

    made: _Made
    device_peak: int | None
