"""Memory and disk that quantizing a model takes, from its shapes; bytes on the CPU.

The constants count arrays that are alive at a time. For a layer [out, in] of 4 bits, in float32:

- the factorisation: the Hessian, its order, the copy that is factorised, its reverse; the weight;
- everything after: the Hessian and the factor; weight, codes, residual and the scale search's or
  the gradient passes' temporaries, ten of the weight's shape.

`tests/bench/peak_memory.py` holds the prediction against what was used.
"""

from dataclasses import dataclass

from dpq_core.hessian import MAGNITUDES
from dpq_core.linear import stored_bytes
from dpq_core.plan import Plan, PlannedLayer
from dpq_core.recipe import CalibrationSection

_FLOAT32, _BFLOAT16, _INT64 = 4, 2, 8


@dataclass(frozen=True)
class Footprint:
    """What quantizing takes above a process that has imported everything.

    layer: of a worker, at its largest layer. block: of the process that calibrates. disk: what
    stays in the store at least: statistics, layers and the checkpoint's.
    """

    layer: int
    block: int
    disk: int


def footprint(plan: Plan, calibration: CalibrationSection) -> Footprint:
    """The prediction for a model's plan."""
    tokens = calibration.samples * calibration.sequence_length
    batch = calibration.batch_size * calibration.sequence_length
    hidden = plan.layers[0].features * tokens * _BFLOAT16  # of the first layer of a block
    statistics = [_statistics(plan, block) for block in range(plan.blocks)]
    stored = sum(stored_bytes(each.rows, each.features, each.scheme) for each in plan.layers)
    return Footprint(
        layer=max(map(layer_bytes, plan.layers)),
        block=max(
            sum(each.weights for each in plan.of_block(block)) * _BFLOAT16
            + statistics[block]
            + hidden
            + batch * max(_widest(each) for each in plan.of_block(block)) * _PER_INPUT
            for block in range(plan.blocks)
        ),
        disk=sum(statistics) + 2 * stored,  # layers lie in the store and in the checkpoint
    )


# Bytes an element of a batch's widest activation: the block's own in BF16, the input that is
# counted in float32, before, while and after it is rounded.
_PER_INPUT = 4 * _BFLOAT16 + 4 * _FLOAT32


def layer_bytes(layer: PlannedLayer) -> int:
    """Most memory that quantizing a layer takes, its weight and statistics included."""
    weight, hessian = layer.weights, layer.features**2
    if layer.scheme.method == "none":
        return _FLOAT32 * (hessian + weight)
    if layer.scheme.bits == 8:
        return _FLOAT32 * (hessian + 6 * weight)
    return _FLOAT32 * max(4 * hessian + weight, 2 * hessian + 10 * weight)


def _statistics(plan: Plan, block: int) -> int:
    """Of a block's inputs: Hessians and histograms."""
    features = {layer.statistics: layer.features for layer in plan.of_block(block)}
    return sum(_FLOAT32 * width**2 + _INT64 * MAGNITUDES for width in features.values())


def _widest(layer: PlannedLayer) -> int:
    return max(layer.rows, layer.features)
