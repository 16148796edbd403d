"""Memory and disk that quantizing a model takes, from its shapes; bytes on the CPU.

The constants count arrays that are alive at a time. For a layer [out, in] of 4 bits, in float32:

- the factorisation: the Hessian, its order, the copy that is factorised, its reverse; the weight,
  as it was read and as it is ordered;
- everything after: the Hessian and the factor; weight, codes, residual and gradient, and what was
  read, five of the weight's shape. Where the kernels for CPUs do not run, the gradient passes take
  as many again.

`tests/bench/peak_memory.py` holds the prediction against what was used.
"""

from dataclasses import dataclass

from dpq_core.hessian import MAGNITUDES
from dpq_core.leaves import Node, leaf_count, leaf_size, shares
from dpq_core.linear import stored_bytes
from dpq_core.plan import Plan, PlannedLayer
from dpq_core.recipe import CalibrationSection

_FLOAT32, _BFLOAT16, _INT64 = 4, 2, 8


@dataclass(frozen=True)
class Footprint:
    """What quantizing takes above a process that has imported everything.

    layer: of a worker, at its largest layer. share: of a worker, where tasks share calibration;
    else 0. block: of the process that calibrates, or adds up what workers did. disk: what stays in
    the store at least: statistics, layers and the checkpoint's.
    """

    layer: int
    share: int
    block: int
    disk: int

    @property
    def worker(self) -> int:
        """Most of any task that a worker gets."""
        return max(self.layer, self.share)


def footprint(plan: Plan, calibration: CalibrationSection, shards: int = 1) -> Footprint:
    """The prediction for a model's plan, with so many tasks that share calibration."""
    batch_size = 1 if calibration.image_column else calibration.batch_size
    leaves = leaf_count(calibration.samples, batch_size)
    root = Node(0, leaves)
    nodes = [root.within(*each) for each in shares(leaves, shards)]
    sums = max(node.sums_alive() for each in nodes for node in each)
    blocks = range(plan.blocks)
    passes = max(_passes(plan, block, calibration, batch_size, sums) for block in blocks)
    statistics = [_statistics(plan, block) for block in blocks]
    added = root.sums_alive([node for each in nodes for node in each]) * max(statistics)
    stored = sum(stored_bytes(each.rows, each.features, each.scheme) for each in plan.layers)
    return Footprint(
        layer=max(map(layer_bytes, plan.layers)),
        share=passes if shards > 1 else 0,
        block=added if shards > 1 else passes,
        disk=sum(statistics) + 2 * stored,  # layers lie in the store and in the checkpoint
    )


def _passes(
    plan: Plan, block: int, calibration: CalibrationSection, batch_size: int, sums: int
) -> int:
    """Of running leaves through a block: its weights, so many statistics, a leaf's hidden states
    before and after, and what a batch's activations take."""
    layers, length = plan.of_block(block), calibration.sequence_length
    leaf = min(calibration.samples, batch_size * leaf_size(batch_size)) * length
    return (
        sum(each.weights for each in layers) * _BFLOAT16
        + sums * _statistics(plan, block)
        + 2 * leaf * plan.layers[0].features * _BFLOAT16  # of the first layer of a block
        + batch_size * length * max(map(_widest, layers)) * _PER_INPUT
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
    return _FLOAT32 * max(4 * hessian + 2 * weight, 2 * hessian + 5 * weight)


def _statistics(plan: Plan, block: int) -> int:
    """Of a block's inputs: Hessians and histograms."""
    features = {layer.statistics: layer.features for layer in plan.of_block(block)}
    return sum(_FLOAT32 * width**2 + _INT64 * MAGNITUDES for width in features.values())


def _widest(layer: PlannedLayer) -> int:
    return max(layer.rows, layer.features)
