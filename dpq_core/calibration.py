"""Calibration statistics of one decoder block.

The block is run over all calibration windows with a hook on one linear of each shared input. What
the Hessian sees is what the layer will multiply: with `hessian_inputs: fp8` the inputs are rounded
as the scheme's activations will be. A static scale must be known before anything can be rounded by
it, so that case takes a first pass for the magnitudes alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpq_core.formats import NumberFormat, fake_quantize
from dpq_core.hessian import InputStatistics
from dpq_core.inputs import Batch
from dpq_core.linear import token_scale
from dpq_core.quantize import static_scale_of
from dpq_core.recipe import CalibrationSection
from dpq_core.scheme import Scheme
from dpq_core.streaming import StreamedModel

# Of an input's first linear, by full name.
BlockStatistics = dict[str, InputStatistics]


@dataclass(frozen=True)
class InputRounding:
    """How inputs are rounded before they are counted in H: the part of a scheme that decides it."""

    inner: NumberFormat
    static: bool
    scheme: Scheme

    @classmethod
    def of(cls, scheme: Scheme, calibration: CalibrationSection) -> "InputRounding | None":
        """None where the Hessian is of the inputs as they are."""
        inner = scheme.inner_format
        if calibration.hessian_inputs == "bf16" or scheme.activations == "none" or inner is None:
            return None
        return cls(inner, scheme.activations == "static", scheme)

    def key(self) -> dict[str, object]:
        """What a calibration's cache key must contain of the scheme."""
        read = {"inner", "fp8_max", "activations", "activation_range", "power_of_two"}
        return self.scheme.model_dump(include=read)

    def apply(self, x: Tensor, statistics: InputStatistics) -> Tensor:
        """x [..., in] as the 8-bit arithmetic will see it. FP32."""
        x = x.float()
        if self.static:
            scale = static_scale_of(statistics, self.scheme).to(x.device)
        else:
            scale = token_scale(x, self.inner.maximum)
        return fake_quantize(x, scale, self.inner)


def calibrate_block(
    stream: StreamedModel,
    index: int,
    batches: Sequence[Batch],
    rounding: InputRounding | None,
    advance: bool,
    on_progress: Callable[[], None] = lambda: None,
) -> BlockStatistics:
    """Statistics of a block's inputs, with the block's own (16-bit) weights.

    Args:
        advance: leave the block's outputs in `batches` (`propagation: original`).
        on_progress: called after each batch of each pass.

    Raises:
        ValueError: the hidden states are not finite.
    """
    device, path = stream.device, stream.block_name(index)
    linears = stream.linears(index)
    with stream.block(index) as block:
        inputs = {
            group[0]: block.get_submodule(group[0].removeprefix(f"{path}."))
            for group in stream.groups(index)
        }
        statistics = {
            name: InputStatistics.empty(linears[name].in_features, device) for name in inputs
        }

        def count_magnitudes(name: str, x: Tensor) -> None:
            statistics[name].add_magnitudes(x)

        def count_hessian(name: str, x: Tensor) -> None:
            seen = rounding.apply(x, statistics[name]) if rounding else x
            statistics[name].add_hessian(seen)

        def count_both(name: str, x: Tensor) -> None:
            count_magnitudes(name, x)
            count_hessian(name, x)

        two_passes = rounding is not None and rounding.static
        if two_passes:
            _run(stream, batches, inputs, count_magnitudes, False, on_progress)
        last = count_hessian if two_passes else count_both
        _run(stream, batches, inputs, last, advance, on_progress)
    return statistics


def _run(
    stream: StreamedModel,
    batches: Sequence[Batch],
    inputs: dict[str, nn.Module],
    observe: Callable[[str, Tensor], None],
    advance: bool,
    on_progress: Callable[[], None],
) -> None:
    with _observing(inputs, observe):
        for batch in batches:
            output = stream.forward(batch)
            if not torch.isfinite(output).all():
                raise ValueError("the 16-bit model's hidden states are not finite")
            if advance:
                batch.hidden = output
            on_progress()


@contextmanager
def _observing(
    modules: dict[str, nn.Module], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: observe(name, arguments[0])

    handles = [m.register_forward_pre_hook(hook_for(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
