"""A block that is run batch by batch, and what its linears are given meanwhile."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpq_core.model.blocks import BlockStream
from dpq_core.model.experts import Given, Routing
from dpq_core.model.finite import inputs_not_finite, not_finite
from dpq_core.model.inputs import Batch


@dataclass(frozen=True)
class ObservedBlock:
    """A block that `stream` has loaded, alone or beside another one in the same place. name: of it.
    inputs: the linears that are observed, by full name. stops: the block is run as far as the one
    linear there is."""

    stream: BlockStream
    name: str
    block: nn.Module
    inputs: dict[str, nn.Linear]
    routing: Routing
    stops: bool

    @classmethod
    def of(
        cls, stream: BlockStream, name: str, block: nn.Module, linears: Sequence[str], stops: bool
    ) -> "ObservedBlock":
        """linears: full names. stops: where one of them is enough."""
        inputs: dict[str, nn.Linear] = {}
        for full_name in linears:
            own = "" if full_name == name else full_name.removeprefix(f"{name}.")
            linear = block.get_submodule(own)  # itself: the output head
            assert isinstance(linear, nn.Linear)
            inputs[full_name] = linear
        return cls(stream, name, block, inputs, Routing(block, name), stops and len(inputs) == 1)

    def run(
        self,
        batches: Iterable[Batch],
        observe: Callable[[str, Tensor], None],
        advance: bool = False,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Call `observe` with each linear's name and input.

        Args:
            advance: leave the block's outputs in `batches`.
            on_progress: called after each of them.

        Raises:
            NotFiniteError: the hidden states are not finite after the block, or before the linear.
        """

        def see(name: str, x: Tensor) -> None:
            if self.stops and not torch.isfinite(x).all():
                raise inputs_not_finite(name, self.stream.dtype)
            observe(name, x)
            if self.stops:
                raise _Reached

        with self.routing.watched(), observing(self.inputs, see):
            for batch in batches:
                self.stream.model.set_submodule(self.name, self.block)
                try:
                    output = self.stream.forward(batch)
                except _Reached:
                    on_progress()
                    continue
                if not torch.isfinite(output).all():
                    raise not_finite(self.name, self.stream.dtype)
                if advance:
                    batch.hidden = output
                on_progress()

    def given(self, batch: Batch) -> dict[str, Given]:
        """What the linears are given of a batch."""
        found: dict[str, Given] = {}

        def keep(name: str, x: Tensor) -> None:
            found[name] = Given(x, self.routing.tokens(name))

        self.run([batch], keep)
        return found


class _Reached(Exception):  # noqa: N818
    """The one linear that is observed has its input: what is left of the block is not run."""


@contextmanager
def observing(
    modules: dict[str, nn.Linear], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `observe` with the name and the input of each module that is run."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: observe(name, arguments[0])

    handles = [m.register_forward_pre_hook(hook_for(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
