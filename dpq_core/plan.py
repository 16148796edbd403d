"""Which linears of a model are quantized, and from which statistics."""

from collections.abc import Mapping
from dataclasses import dataclass

from dpq_core.choices import chosen_scheme
from dpq_core.reader import CheckpointError
from dpq_core.scheme import Scheme
from dpq_core.streaming import StreamedModel


@dataclass(frozen=True)
class PlannedLayer:
    """One linear to quantize, and how.

    name: full module path. statistics: the shared input's name, its first linear's full name.
    """

    name: str
    block: int
    statistics: str
    rows: int
    features: int
    scheme: Scheme

    @property
    def weights(self) -> int:
        return self.rows * self.features


@dataclass(frozen=True)
class Plan:
    """Layers in order, and those left in 16 bits with the reason."""

    layers: tuple[PlannedLayer, ...]
    skipped: dict[str, str]

    @property
    def blocks(self) -> int:
        return self.layers[-1].block + 1

    def of_block(self, block: int) -> list[PlannedLayer]:
        return [layer for layer in self.layers if layer.block == block]


def plan_layers(
    stream: StreamedModel, scheme: Scheme, choices: Mapping[str, str] | None = None
) -> Plan:
    """All linears of all blocks; those narrower than a group are skipped by name.

    Args:
        scheme: of all layers but those that `choices` names.
        choices: layer's full name → its choice (`dpq_core.choices`).

    Raises:
        CheckpointError: no layer is left to quantize, or a choice for a layer that is not there.
    """
    choices = dict(choices or {})
    layers: list[PlannedLayer] = []
    skipped = {stream.family.head: "output head, kept in 16 bits"}
    for block in range(stream.block_count):
        shared = {member: group[0] for group in stream.family.shared_inputs for member in group}
        prefix = stream.block_name(block)
        for name, linear in stream.linears(block).items():
            rows, features = linear.out_features, linear.in_features
            own = chosen_scheme(scheme, choices.pop(name)) if name in choices else scheme
            if own.bits == 4 and features < own.group_size:
                skipped[name] = f"{features} inputs are fewer than group_size {own.group_size}"
                continue
            source = f"{prefix}.{shared[name.removeprefix(f'{prefix}.')]}"
            layers.append(PlannedLayer(name, block, source, rows, features, own))
    if not layers:
        raise CheckpointError(
            f"no linear layer has as many inputs as group_size {scheme.group_size}: "
            "choose a smaller scheme.group_size"
        )
    if choices:
        raise CheckpointError(f"layers: the model has no linear {next(iter(choices))}")
    return Plan(tuple(layers), skipped)
