"""Calibration statistics of one decoder block.

The block is run over all calibration windows with a hook on one linear of each shared input. What
the Hessian sees is what the layer will multiply: with `hessian_inputs: fp8` the inputs are rounded
as the scheme's activations will be. A static scale must be known before anything can be rounded by
it, so that case takes a first pass for the magnitudes alone. How much each token counts is
said by `TokenWeights`.

Every sum is made by the tree of `dpq_core.calibration.reduction_tree`. `BlockPasses` gives the sums
of a leaf, where others wait for it: in main memory, so that a device holds one leaf's Hessians at a
time, or on the device, where they need not travel.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from dpq_core.arithmetic.formats import NumberFormat, quantize
from dpq_core.calibration.reduction_tree import Node, leaves_of, summed
from dpq_core.kernels import cpu
from dpq_core.kernels.definitions import MAGNITUDES
from dpq_core.kernels.dispatch import count_magnitudes
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.input_scale import static_scale_of, token_scale
from dpq_core.layer.token_weights import equal_norms, raise_first
from dpq_core.model.finite import not_finite
from dpq_core.model.inputs import Batch
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import CalibrationSection
from dpq_core.recipe.scheme import Scheme

# Of an input's first linear, by full name.
BlockStatistics = dict[str, InputStatistics]
BlockMagnitudes = dict[str, Tensor]  # [2**15] int64 each


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

    def static_scale(self, magnitudes: Tensor) -> Tensor | None:
        """The scale that `apply` takes, from an input's magnitudes; None where every token has its
        own."""
        return static_scale_of(magnitudes, self.scheme) if self.static else None

    def rounded(self, x: Tensor, static_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [..., in] as the 8-bit arithmetic will see it: 8-bit values in BF16 and the scale that
        they are in units of, a scalar; or, where every token has its own, FP32 and None."""
        rows = x.reshape(-1, x.shape[-1])
        scale = token_scale(rows, self.inner.maximum) if static_scale is None else static_scale
        if rows.is_cpu and rows.dtype == torch.bfloat16:
            values = cpu.quantize(rows, scale, self.inner)
        else:
            values = quantize(rows, scale, self.inner).to(torch.bfloat16)
        return (values.float() * scale, None) if static_scale is None else (values, scale)


@dataclass(frozen=True)
class TokenWeights:
    """How much tokens count in H beside one another.

    equal: their inputs are brought to one norm. first_share: of a window's weight, its first token.
    """

    equal: bool
    first_share: float

    @classmethod
    def of(cls, calibration: CalibrationSection) -> "TokenWeights":
        return cls(calibration.token_weights == "equal", calibration.first_token_share)

    def applied(
        self,
        x: Tensor,  # [..., in], or [tokens, in] of the same tokens
        scale: Tensor | None,
        window: torch.Size | None,  # [windows, length, in] where these are whole windows
    ) -> tuple[Tensor, Tensor | None]:
        """Inputs times the roots of their weights, and the scale that they are in units of."""
        if self.equal:
            x, scale = equal_norms(x), None
        if self.first_share and window is not None:
            x = raise_first(x.view(window), self.first_share)
        return x, scale


def calibrate_block(
    stream: StreamedModel,
    index: int,
    batches: Sequence[Batch],
    rounding: InputRounding | None,
    weights: TokenWeights,
    advance: bool,
) -> BlockStatistics:
    """Statistics of a block's inputs, with the block's own (16-bit) weights, on the model's device.

    Args:
        advance: leave the block's outputs in `batches` (`propagation: original`).

    Raises:
        NotFiniteError: the hidden states are not finite after the block.
    """
    leaves = leaves_of(batches, len(batches[0].inputs["input_ids"]))
    root, magnitudes = Node(0, len(leaves)), None
    with block_passes(stream, index, rounding, weights, stream.device) as passes:
        if passes.two:
            magnitudes = summed(root, lambda leaf: passes.magnitudes(leaves[leaf]), add_magnitudes)
        statistics = summed(
            root, lambda leaf: passes.statistics(leaves[leaf], magnitudes, advance), add_statistics
        )
    return completed(statistics, magnitudes)


@contextmanager
def block_passes(
    stream: StreamedModel,
    index: int,
    rounding: InputRounding | None,
    weights: TokenWeights,
    sums_on: torch.device | str = "cpu",
) -> Iterator["BlockPasses"]:
    """A block with its weights, while it lasts, to run batches through. The next one is read from
    the disk meanwhile."""
    path = stream.block_name(index)
    with stream.block(index) as block:
        stream.read_ahead(index + 1)
        inputs: dict[str, nn.Linear] = {}
        for first, *_ in stream.groups(index):
            linear = block.get_submodule(first.removeprefix(f"{path}."))
            assert isinstance(linear, nn.Linear)
            inputs[first] = linear
        yield BlockPasses(stream, path, inputs, rounding, weights, sums_on)


@dataclass(frozen=True)
class BlockPasses:
    """The passes over the block that `stream` has loaded. name: of it. inputs: the linear of each
    shared input that is watched, by name. sums_on: where a leaf's sums wait for others.
    `on_progress` is called after each batch.

    Raises:
        NotFiniteError: the hidden states are not finite after the block.
    """

    stream: StreamedModel
    name: str
    inputs: dict[str, nn.Linear]
    rounding: InputRounding | None
    weights: TokenWeights
    sums_on: torch.device | str

    @property
    def two(self) -> bool:
        """Whether the magnitudes of all leaves must be known before any Hessian."""
        return self.rounding is not None and self.rounding.static

    def magnitudes(
        self, batches: Sequence[Batch], on_progress: Callable[[], None] = lambda: None
    ) -> BlockMagnitudes:
        """Of a leaf: the first of two passes."""
        device = self.stream.device
        counts = {
            name: torch.zeros(MAGNITUDES, dtype=torch.int64, device=device) for name in self.inputs
        }

        def count(name: str, x: Tensor) -> None:
            counts[name] += count_magnitudes(x)

        self._run(batches, count, False, on_progress)
        return {name: each.to(self.sums_on) for name, each in counts.items()}

    def statistics(
        self,
        batches: Sequence[Batch],
        magnitudes: BlockMagnitudes | None,
        advance: bool,
        on_progress: Callable[[], None] = lambda: None,
    ) -> BlockStatistics:
        """Of a leaf: the last pass.

        Args:
            magnitudes: of all leaves, where there are two passes; they are not counted again then.
            advance: leave the block's outputs in `batches`.
        """
        device, rounding = self.stream.device, self.rounding
        # Others are an expert's tokens, or a vision tower's patches.
        lengths = {batch.inputs["input_ids"].shape[1] for batch in batches}
        statistics = {
            name: InputStatistics.empty(linear.in_features, device)
            for name, linear in self.inputs.items()
        }

        @cache
        def rounded_by(name: str) -> Tensor | None:
            scale = rounding.static_scale(magnitudes[name]) if rounding and magnitudes else None
            return scale if scale is None else scale.to(device)

        def count(name: str, x: Tensor) -> None:
            if magnitudes is None:
                statistics[name].add_magnitudes(x)
            seen, scale = rounding.rounded(x, rounded_by(name)) if rounding else (x, None)
            window = x.shape if x.ndim == 3 and x.shape[1] in lengths else None
            statistics[name].add_hessian(*self.weights.applied(seen, scale, window))

        self._run(batches, count, advance, on_progress)
        return {name: each.to(self.sums_on) for name, each in statistics.items()}

    def _run(
        self,
        batches: Sequence[Batch],
        observe: Callable[[str, Tensor], None],
        advance: bool,
        on_progress: Callable[[], None],
    ) -> None:
        with _observing(self.inputs, observe):
            for batch in batches:
                output = self.stream.forward(batch)
                if not torch.isfinite(output).all():
                    raise not_finite(self.name, self.stream.dtype)
                if advance:
                    batch.hidden = output
                on_progress()


def add_magnitudes(left: BlockMagnitudes, right: BlockMagnitudes) -> BlockMagnitudes:
    """Of both sets of leaves."""
    return {name: left[name] + right[name] for name in left}


def add_statistics(left: BlockStatistics, right: BlockStatistics) -> BlockStatistics:
    """Of both sets of leaves, in place of the left one."""
    for name, statistics in left.items():
        statistics.add(right.pop(name))
    return left


def completed(statistics: BlockStatistics, magnitudes: BlockMagnitudes | None) -> BlockStatistics:
    """Statistics of all leaves, with the magnitudes that the first of two passes counted."""
    for name, each in (magnitudes or {}).items():
        statistics[name].magnitudes = each
    return statistics


@contextmanager
def _observing(
    modules: dict[str, nn.Linear], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: observe(name, arguments[0])

    handles = [m.register_forward_pre_hook(hook_for(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
