"""Calibration statistics of one decoder block.

The block is run over all calibration windows with a hook on one linear of each shared input. What
the Hessian sees is what the layer will multiply: with `hessian_inputs: fp8` the inputs are rounded
as the scheme's activations will be. A static scale must be known before anything can be rounded by
it, so that case takes a first pass for the magnitudes alone. How much each token counts is
said by `TokenWeights`. Of windows that no Hessian sees, some tokens' inputs are kept as they are.

With `propagation: groups` a block is calibrated in steps (`Step`), each on the block as it is after
the layers of the step before: it is run as far as the linear that is watched. Where layers are
corrected, the 16-bit block is run beside it, batch by batch, on hidden states of its own.

Every sum is made by the tree of `dpq_core.calibration.reduction_tree`. `BlockPasses` gives the sums
of a leaf, where others wait for it: in main memory, so that a device holds one leaf's Hessians at a
time, or on the device, where they need not travel.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from dpq_core.arithmetic.formats import NumberFormat, quantize
from dpq_core.calibration.reduction_tree import Node, leaves_of, summed
from dpq_core.data.texts import DataError, evenly_spaced
from dpq_core.kernels import cpu
from dpq_core.kernels.definitions import MAGNITUDES
from dpq_core.kernels.dispatch import count_magnitudes
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.input_scale import static_scale_of, token_scale
from dpq_core.layer.kv_cache import CacheMaxima
from dpq_core.layer.records import QuantizedLinear
from dpq_core.layer.token_weights import equal_norms, first_root, raise_first
from dpq_core.model.experts import Given
from dpq_core.model.inputs import Batch, Purpose
from dpq_core.model.kv_cache import cached_attention, maxima_of_cache
from dpq_core.model.observed import ObservedBlock
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import CalibrationSection
from dpq_core.recipe.scheme import Scheme

# Of an input's first linear, by full name.
BlockStatistics = dict[str, InputStatistics]
BlockMagnitudes = dict[str, Tensor]  # [2**15] int64 each

UNSEEN = 128  # tokens of a window that no Hessian sees, which are kept


@dataclass(frozen=True)
class InputRounding:
    """How inputs are rounded before they are counted in H: the part of a scheme that decides it."""

    inner: NumberFormat
    static: bool
    scheme: Scheme

    @classmethod
    def of(cls, scheme: Scheme, calibration: CalibrationSection) -> "InputRounding | None":
        """None where the Hessian is of the inputs as they are."""
        inner = scheme.input_format
        if calibration.hessian_inputs == "bf16" or scheme.activations == "none" or inner is None:
            return None
        return cls(inner, scheme.activations == "static", scheme)

    def key(self) -> dict[str, object]:
        """What a calibration's cache key must contain of the scheme."""
        read = {"inner", "fp8_max", "activations", "activation_range", "power_of_two"}
        return self.scheme.model_dump(include=read)

    def static_scale(self, magnitudes: Tensor) -> Tensor | None:
        """The scale that `rounded` takes, from an input's magnitudes; None where each token has its
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

    def roots(self, x: Tensor, window: torch.Size | None) -> Tensor:
        """What `applied` multiplies inputs x [tokens, in] fp32 with, [tokens, 1] fp32."""
        roots = torch.ones(len(x), 1, device=x.device)
        if self.equal:
            norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            roots = torch.where(norms > 0, 1 / norms, 0)
        if self.first_share and window is not None:
            roots.view(*window[:2])[:, 0] *= first_root(self.first_share, window[1])
        return roots


@dataclass(frozen=True)
class Step:
    """A step through a block some linears of which are quantized already. inputs: those that come
    next, names of shared inputs. layers: the quantized ones, by name. beside: the 16-bit model's
    inputs are counted too.
    """

    inputs: tuple[str, ...]
    layers: Mapping[str, QuantizedLinear]
    beside: bool = False


def calibrate_block(
    stream: StreamedModel,
    index: int,
    batches: Sequence[Batch],
    rounding: InputRounding | None,
    weights: TokenWeights,
    advance: bool,
    step: Step | None = None,
    originals: Sequence[Batch] = (),
    cache: bool = False,
) -> BlockStatistics:
    """Statistics of a block's inputs, with the block's own (16-bit) weights, on the model's device.

    Args:
        advance: leave the block's outputs in `batches` (`propagation: original`).
        step: of these inputs alone, with these layers in the block.
        originals: the same batches before the block in the 16-bit model, with `step.beside`.
        cache: keys and values are looked at too.

    Raises:
        NotFiniteError: the hidden states are not finite after the block.
    """
    windows = len(batches[0].inputs["input_ids"])
    uncounted = len(_only(batches, "unseen"))
    leaves, beside = (leaves_of(each, windows, uncounted) for each in (batches, originals))
    root, magnitudes = Node(0, len(leaves)), None
    opened = block_passes(stream, index, rounding, weights, stream.device, step, cache)
    with opened as passes:
        if passes.two or any(batch.purpose == "hessians" for batch in batches):
            magnitudes = summed(root, lambda leaf: passes.magnitudes(leaves[leaf]), add_magnitudes)

        def of_leaf(leaf: int) -> BlockStatistics:
            others = beside[leaf] if step and step.beside else ()
            return passes.statistics(leaves[leaf], magnitudes, advance, originals=others)

        return completed(summed(root, of_leaf, add_statistics), magnitudes)


@contextmanager
def block_passes(
    stream: StreamedModel,
    index: int,
    rounding: InputRounding | None,
    weights: TokenWeights,
    sums_on: torch.device | str = "cpu",
    step: Step | None = None,
    cache: bool = False,
) -> Iterator["BlockPasses"]:
    """A block with its weights, while it lasts, to run batches through. The next one is read from
    the disk meanwhile."""
    path, names = stream.block_name(index), [first for first, *_ in stream.groups(index)]
    if step:
        names = [name for name in names if name in step.inputs]
    stops = step is not None or index == stream.block_count  # the head's products are not made
    observed = partial(ObservedBlock.of, stream, path, linears=names, stops=stops)
    beside = None
    with ExitStack() as blocks:
        block = blocks.enter_context(stream.block(index, step.layers if step else None))
        stream.read_ahead(index + 1)
        if step and step.beside:
            beside = observed(block=blocks.enter_context(stream.block(index)))
        attention = cached_attention(stream, index) if cache else None
        if attention and attention[1] not in names:  # of another step
            attention = None
        passed = observed(block=block)
        yield BlockPasses(passed, rounding, weights, sums_on, beside, attention)


@dataclass(frozen=True)
class BlockPasses:
    """The passes over a block that is loaded. sums_on: where a leaf's sums wait for others. beside:
    the 16-bit block, whose inputs are counted too. cached: of `cached_attention`, whose keys and
    values are looked at. `on_progress` is called after each batch.

    Raises:
        NotFiniteError: the hidden states are not finite after the block.
    """

    block: ObservedBlock
    rounding: InputRounding | None
    weights: TokenWeights
    sums_on: torch.device | str
    beside: ObservedBlock | None = None
    cached: tuple[str, str] | None = None

    @property
    def inputs(self) -> dict[str, nn.Linear]:
        """The linear of each shared input that is watched, by name."""
        return self.block.inputs

    @property
    def two(self) -> bool:
        """Whether the magnitudes of all leaves must be known before any Hessian. (They are, too,
        where they are of other windows.)"""
        return self.rounding is not None and self.rounding.static

    def magnitudes(
        self, batches: Sequence[Batch], on_progress: Callable[[], None] = lambda: None
    ) -> BlockMagnitudes:
        """Count a leaf's magnitudes: the first of two passes."""
        device = self.block.stream.device
        counts = {
            name: torch.zeros(MAGNITUDES, dtype=torch.int64, device=device) for name in self.inputs
        }

        def count(name: str, x: Tensor) -> None:
            counts[name] += count_magnitudes(x)

        self.block.run(_only(batches, "both", "scales"), count, False, on_progress)
        return {name: each.to(self.sums_on) for name, each in counts.items()}

    def statistics(
        self,
        batches: Sequence[Batch],
        magnitudes: BlockMagnitudes | None,
        advance: bool,
        on_progress: Callable[[], None] = lambda: None,
        originals: Sequence[Batch] = (),
    ) -> BlockStatistics:
        """Sum a leaf's statistics: the last pass.

        Args:
            magnitudes: of all leaves, where there are two passes; they are not counted again then.
            advance: leave the block's outputs in `batches`.
            originals: the same batches before the block in the 16-bit model, with `beside`.

        Raises:
            DataError: windows for scales reach less of a block than those for Hessians.
        """
        device, rounding = self.block.stream.device, self.rounding
        # Others are an expert's tokens, or a vision tower's patches.
        lengths = {batch.inputs["input_ids"].shape[1] for batch in batches}
        windows = len(batches[0].inputs["input_ids"])
        statistics = {
            name: InputStatistics.empty(linear.in_features, device, shifted=bool(self.beside))
            for name, linear in self.inputs.items()
        }
        theirs: dict[str, Given] = {}

        @cache
        def rounded_by(name: str) -> Tensor | None:
            if magnitudes is not None and not magnitudes[name].any():
                raise DataError(
                    f"calibration.activations: none of its tokens reaches {name}, which those of"
                    " calibration.dataset reach: raise its samples, or leave it out"
                )
            scale = rounding.static_scale(magnitudes[name]) if rounding and magnitudes else None
            return scale if scale is None else scale.to(device)

        def rounded(name: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
            by = rounded_by(name)
            return rounding.rounded(x, by) if rounding else (x, None)

        def windows_of(x: Tensor) -> torch.Size | None:
            return x.shape if x.ndim == 3 and x.shape[1] in lengths else None

        def keep(name: str, x: Tensor) -> None:
            window = windows_of(x)
            tokens = evenly_spaced(x.shape[-2], UNSEEN * (1 if window else windows))
            some = x.index_select(-2, tokens.to(x.device))
            weighted, unit = self.weights.applied(*rounded(name, some), window and some.shape)
            statistics[name].add_unseen(weighted, unit)

        def count(name: str, x: Tensor) -> None:
            if magnitudes is None:
                statistics[name].add_magnitudes(x)
            seen, scale = rounded(name, x)
            window = windows_of(x)
            weighted, unit = self.weights.applied(seen, scale, window)
            statistics[name].add_hessian(weighted, unit)
            if self.beside:
                x8 = seen.reshape(-1, x.shape[-1]).float() * (1 if scale is None else scale)
                x16 = Given(x, self.block.routing.tokens(name)).as_given(theirs.get(name), name)
                away = (x16.float() - x8).mul_(self.weights.roots(x8, window))
                statistics[name].add_shift(away, weighted.reshape(x8.shape), unit)

        counted, originals = (_only(each, "both", "hessians") for each in (batches, originals))
        passing = self._in_both(counted, originals, theirs) if self.beside else counted
        with self._looking_at_cache(statistics):
            self.block.run(passing, count, advance, on_progress)
            if advance or self.cached:
                others = _only(batches, "scales")
                self.block.run(others, lambda name, x: None, advance, on_progress)
            self.block.run(_only(batches, "unseen"), keep, advance, on_progress)
        return {name: each.to(self.sums_on) for name, each in statistics.items()}

    @contextmanager
    def _looking_at_cache(self, statistics: BlockStatistics) -> Iterator[None]:
        """With the largest keys and values of all windows, whatever these are for, kept beside the
        input that is made of them."""
        if self.cached is None:
            yield
            return
        path, made = self.cached
        attention = self.block.block.get_submodule(path.removeprefix(f"{self.block.name}."))
        with maxima_of_cache(attention) as found:
            yield
        for each in found[1:]:
            found[0].add(each)
        statistics[made].cache = found[0]

    def _in_both(
        self, batches: Sequence[Batch], originals: Sequence[Batch], theirs: dict[str, Given]
    ) -> Iterator[Batch]:
        """Each batch, once `theirs` is what the 16-bit model gives the linears of it."""
        assert self.beside
        for batch, original in zip(batches, originals, strict=True):
            theirs.clear()
            theirs.update(self.beside.given(original))
            yield batch


def _only(batches: Sequence[Batch], *purposes: Purpose) -> list[Batch]:
    return [batch for batch in batches if batch.purpose in purposes]


def add_magnitudes(left: BlockMagnitudes, right: BlockMagnitudes) -> BlockMagnitudes:
    """The counts of both sets of leaves together."""
    return {name: left[name] + right[name] for name in left}


def add_statistics(left: BlockStatistics, right: BlockStatistics) -> BlockStatistics:
    """The sums over both sets of leaves, in place of the left one's."""
    for name, statistics in left.items():
        statistics.add(right.pop(name))
    return left


def completed(statistics: BlockStatistics, magnitudes: BlockMagnitudes | None) -> BlockStatistics:
    """Statistics of all leaves, with the magnitudes that the first of two passes counted."""
    for name, each in (magnitudes or {}).items():
        statistics[name].magnitudes = each
    return statistics


def cache_maxima(
    stream: StreamedModel, index: int, statistics: BlockStatistics
) -> dict[str, CacheMaxima]:
    """Of the block's attention, by its name, where these statistics have them."""
    name, made = cached_attention(stream, index) or ("", "")
    found = statistics[made].cache if made in statistics else None
    return {} if found is None else {name: found}
