"""Which linears of a model are quantized, and from which statistics.

All of the blocks, and the output head and the embedding where a choice names them. These are no
part of what DPQ's paper quantizes, but most of a small model's bytes. An embedding has no Hessian,
its rows being looked up: it is rounded to nearest.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from dpq_core.errors import listed
from dpq_core.layer.given import GivenWeight
from dpq_core.model.given import GivenReader
from dpq_core.model.reader import CheckpointError, CheckpointReader
from dpq_core.model.streaming import StreamedModel, as_run
from dpq_core.recipe.layer_choices import chosen_scheme
from dpq_core.recipe.scheme import Scheme

Outside = Literal["", "head", "embedding", "both"]  # "": in a block


@dataclass(frozen=True)
class PlannedLayer:
    """One linear to quantize, and how.

    name: full module path. block: the head's is what would be the next; an embedding's is −1.
    statistics: the shared input's name, its first linear's full name; empty for an embedding.
    step: of its block, see `BlockStream.steps`. outside: what it is outside of the blocks; both,
    where they are tied.
    """

    name: str
    block: int
    statistics: str
    rows: int
    features: int
    scheme: Scheme
    step: int = 0
    outside: Outside = ""

    @property
    def weights(self) -> int:
        return self.rows * self.features

    def under(self, scheme: Scheme, choice: str) -> "PlannedLayer":
        """The layer with another choice of a recipe's scheme."""
        own = chosen_scheme(scheme, choice)
        return replace(self, scheme=own if self.statistics else looked_up(own))


@dataclass(frozen=True)
class Plan:
    """Layers in order, and those left in 16 bits with the reason. embedding: its weights. reading:
    bytes that the largest part of the model takes while it is read, see `_reading`."""

    layers: tuple[PlannedLayer, ...]
    skipped: dict[str, str]
    embedding: int
    reading: int

    @property
    def blocks(self) -> int:
        """That calibration passes, the head among them where it is quantized."""
        return self.layers[-1].block + 1

    def of_block(self, block: int, inputs: Collection[str] | None = None) -> list[PlannedLayer]:
        """A block's layers; with `inputs` those alone that read one of these shared inputs."""
        layers = [layer for layer in self.layers if layer.block == block]
        return [each for each in layers if inputs is None or each.statistics in inputs]

    def inputs_by_step(self, block: int) -> list[tuple[str, ...]]:
        """Names of the shared inputs that a block's layers have, step by step."""
        names: dict[int, dict[str, None]] = {}
        for layer in self.of_block(block):
            names.setdefault(layer.step, {})[layer.statistics] = None
        return [tuple(names[step]) for step in sorted(names)]


def readers_of_one_input(layers: Iterable[PlannedLayer]) -> list[tuple[PlannedLayer, ...]]:
    """Layers of a plan, in its order, those together that share their statistics."""
    return [tuple(each) for _, each in groupby(layers, key=lambda layer: layer.statistics)]


def kept_lines(skipped: Mapping[str, str]) -> list[str]:
    """What stays in 16 bits, a line for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    return [f"not quantized: {listed(each)} ({reason})" for reason, each in names.items()]


def plan_layers(
    stream: StreamedModel, scheme: Scheme, choices: Mapping[str, str] | None = None
) -> Plan:
    """All linears of all blocks, and what `choices` names outside of them. What stays in 16 bits is
    named with its reason: linears narrower than a group, those that the calibration does not reach,
    and matrices that are no linears.

    Args:
        scheme: of all layers but those that `choices` names.
        choices: layer's full name → its choice (`dpq_core.recipe.layer_choices`).

    Raises:
        CheckpointError: no layer is left to quantize, a choice for a layer that is not there, or a
            linear that the model table does not know.
    """
    choices, scheme = dict(choices or {}), scheme.of_layers
    layers: list[PlannedLayer] = []
    outside = list(_outside(stream, scheme, choices))
    skipped = dict[str, str]()
    if not any(layer.statistics for layer in outside):
        skipped[stream.anatomy.parts.head] = "output head, kept in 16 bits"
    for block in range(stream.block_count):
        linears = stream.linears(block)
        for step, groups in enumerate(stream.steps(block)):
            for first, name in ((group[0], name) for group in groups for name in group):
                rows, features = linears[name].out_features, linears[name].in_features
                own = chosen_scheme(scheme, choices.pop(name)) if name in choices else scheme
                if rows <= stream.gate_rows(block):
                    skipped[name] = f"a gate of {rows} outputs, kept in 16 bits"
                    continue
                if reason := _too_narrow(features, own):
                    skipped[name] = reason
                    continue
                layers.append(PlannedLayer(name, block, first, rows, features, own, step))
    if not layers:
        raise CheckpointError(
            f"no linear layer has as many inputs as group_size {scheme.group_size}: "
            "choose a smaller scheme.group_size"
        )
    layers = _keeping(stream.reader, layers, skipped)
    known = {layer.name for layer in layers} | skipped.keys() | {stream.anatomy.parts.head}
    skipped |= _not_in_blocks(stream, known)
    for name in choices:
        why = f", which is kept: {skipped[name]}" if name in skipped else ""
        raise CheckpointError(f"layers: the model has no linear {name}{why}")
    for layer in outside:  # the embedding before all, the head after all
        layers.insert(0 if not layer.statistics else len(layers), layer)
    embedding = stream.parameters[f"{stream.anatomy.parts.embedding}.weight"].numel()
    return Plan(tuple(layers), skipped, embedding, _reading(stream))


def weight_of(
    reader: CheckpointReader, layer: PlannedLayer, dtype: torch.dtype
) -> Tensor | GivenWeight:
    """What a planned layer is made of: its 16-bit weight [out, in] as a model that runs in `dtype`
    has it, or its codes where they are kept."""
    if layer.scheme.keeps and isinstance(reader, GivenReader):
        return reader.codes(layer.name, layer.scheme.group_size)
    return as_run(reader.tensor(f"{layer.name}.weight"), dtype)


def _keeping(
    reader: CheckpointReader, layers: list[PlannedLayer], skipped: dict[str, str]
) -> list[PlannedLayer]:
    """Layers without those whose codes are to be kept and which have none: they are `skipped`.

    Raises:
        CheckpointError: codes that the layer's scheme has no grid for, all of them by name.
    """
    keeping = [layer for layer in layers if layer.scheme.keeps]
    if not keeping:
        return layers
    has = reader.has_codes if isinstance(reader, GivenReader) else lambda _: False
    without = {layer.name for layer in keeping if not has(layer.name)}
    if len(without) == len(keeping):
        raise CheckpointError(f"{reader.folder}: scheme.method is keep, and no layer has codes")
    skipped |= dict.fromkeys(sorted(without), "16 bits in the given checkpoint")
    wrong: dict[str, list[str]] = {}
    for layer in keeping:
        if layer.name in without or not isinstance(reader, GivenReader):
            continue
        if reason := reader.obstacle(layer.name, layer.scheme):
            wrong.setdefault(reason, []).append(layer.name)
    if wrong:
        said = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in wrong.items())
        raise CheckpointError(
            f"{reader.folder}: codes that do not fit the scheme: {said}: change the scheme, give"
            " these layers the choice w8a8 or bf16 (layers), or quantize the model that they were"
            " made of"
        )
    return [layer for layer in layers if layer.name not in without]


def _too_narrow(features: int, scheme: Scheme) -> str | None:
    if scheme.bits == 8 or features >= scheme.group_size:
        return None
    return f"{features} inputs are fewer than group_size {scheme.group_size}"


def _outside(
    stream: StreamedModel, scheme: Scheme, choices: dict[str, str]
) -> Iterator[PlannedLayer]:
    """Head and embedding, those that `choices` names, which are taken out of it.

    Raises:
        CheckpointError: a head that is tied, or one narrower than a group.
    """
    parts, end = stream.anatomy.parts, stream.block_count
    stored = stream.outside.weight_of(parts.head)
    if stored != parts.head and parts.head in choices:
        raise CheckpointError(
            f"layers: {parts.head} is tied to {stored}, one weight, whose codes serve both: name"
            f" {stored}"
        )
    for name in dict.fromkeys((parts.embedding, stored)):
        if name not in choices:
            continue
        own = chosen_scheme(scheme, choices.pop(name))
        if own.keeps and name == stored:
            raise CheckpointError(f"layers: {name} has no codes to keep: give it w8a8 or w8a16")
        rows, features = stream.parameters[f"{name}.weight"]
        if reason := _too_narrow(features, own):
            raise CheckpointError(f"layers: {name}: {reason}: give it w8a8 or w8a16, or leave it")
        if name == stored:
            part: Outside = "head" if stored == parts.head else "both"
            yield PlannedLayer(name, end, parts.head, rows, features, own, outside=part)
        else:
            own = looked_up(own)
            yield PlannedLayer(name, -1, "", rows, features, own, outside="embedding")


def looked_up(scheme: Scheme) -> Scheme:
    """The scheme of an embedding: rounded to nearest, in the formats of a linear's weight."""
    method = scheme.method if scheme.method == "none" else "rtn"
    search = "mse" if scheme.scale_search == "hessian" else scheme.scale_search
    plain = {"order": "none", "rounding": "nearest", "activations": "none"}
    changed = {"method": method, "scale_search": search, **plain}
    return Scheme.model_validate({**scheme.model_dump(), **changed})


def _reading(stream: StreamedModel) -> int:
    """Most bytes that a part takes while it is read, the embedding or a block: the file is mapped
    as long as its tensors get memory of their own, and what is not stored in 16 bits is turned into
    those beside it. A vocabulary of 262,144 makes the embedding of a small model the largest."""
    reader, run = stream.reader, stream.dtype.itemsize
    blocks = [reader.under(stream.block_name(block)) for block in range(stream.block_count)]
    return max(
        sum(_reading_one(*reader.shape_and_type(name), run) for name in part)
        for part in ([f"{stream.anatomy.parts.embedding}.weight"], *blocks)
    )


def _reading_one(shape: list[int], stored_as: str, run: int) -> int:
    stored = _WIDE.get(stored_as, run)
    return math.prod(shape) * (2 * stored + (run if stored > run else 0))


_WIDE = {"F32": 4, "F64": 8}  # bytes of a number, by safetensors' names


def _not_in_blocks(stream: StreamedModel, known: set[str]) -> dict[str, str]:
    """Matrices other than the embedding and those `known`, and why they stay in 16 bits.

    Raises:
        CheckpointError: a linear for which there is no reason.
    """
    vision, reasons = stream.vision, {}
    known = known | {stream.anatomy.parts.embedding}
    for parameter, shape in stream.parameters.items():
        name, _, kind = parameter.rpartition(".")
        if kind != "weight" or len(shape) < 2 or name in known:
            continue
        of_tower = vision is not None and name.startswith(f"{vision.tower}.")
        if not issubclass(stream.modules[name], nn.Linear):
            reasons[name] = f"{stream.modules[name].__name__}, no linear layer"
        elif of_tower and not stream.images:
            reasons[name] = "calibration without images never reaches it (calibration.image_column)"
        elif name in stream.anatomy.before + stream.anatomy.after:
            reasons[name] = "outside the blocks, kept in 16 bits"
        elif of_tower:
            raise CheckpointError(
                f"{stream.reader.folder}: linear {name} is in no block of the model's row in "
                "dpq_core/model/families.py: mend the row"
            )
        else:
            reasons[name] = "no text reaches it, kept in 16 bits"
    return reasons
