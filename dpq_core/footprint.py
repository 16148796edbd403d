"""Memory and disk that quantizing a model takes, from its shapes; bytes on the CPU.

The constants count arrays that are alive at a time. For a layer [out, in] of 4 bits, in float32:

- the factorisation: the Hessian, its order, the copy that is factorised, its reverse; the weight,
  as it was read and as it is ordered;
- everything after: the Hessian and the factor; weight, codes, residual and gradient, and what was
  read, five of the weight's shape. Where the kernels for CPUs do not run, the gradient passes take
  as many again;
- where layers are corrected, two more of the Hessian's shape all the time: what the 16-bit model's
  inputs differ by, and what is made of it.

Before the first block the embedding is read, and what it makes of all samples waits to be written:
with a vocabulary of 262,144 that is more than anything else that a small model takes.

`tests/bench/peak_memory.py` holds the prediction against what was used.
"""

from dataclasses import dataclass

from dpq_core.calibration.reduction_tree import Node, leaf_count, leaf_size, shares
from dpq_core.calibration.statistics import UNSEEN
from dpq_core.kernels.definitions import MAGNITUDES
from dpq_core.layer.quantize import rows_at_once
from dpq_core.layer.storage import stored_bytes
from dpq_core.model.fp8 import WORKSPACE
from dpq_core.model.plan import Plan, PlannedLayer
from dpq_core.recipe import CalibrationSection

_FLOAT32, _BFLOAT16, _INT64, _CODES = 4, 2, 8, 1
PROCESS = 150 << 20  # compiled kernels, and what libraries keep from their first use on


@dataclass(frozen=True)
class Footprint:
    """What quantizing takes above a process that has imported everything.

    layer: of a worker, at its largest layer. share: of a worker, where tasks share calibration;
    else 0. block: of the worker that calibrates, or adds up what others did. disk: what stays in
    the store at least: layers, the checkpoint's, and statistics. device: of a worker's device at
    the most, where that has memory of its own; else 0. shards: tasks that share a block's
    calibration. blocks_per_task: that calibration passes before hidden states go to the store.
    """

    layer: int
    share: int
    block: int
    disk: int
    statistics: int
    device: int
    shards: int = 1
    blocks_per_task: int = 1

    @property
    def worker(self) -> int:
        """Bytes of a worker process: the most of any task that it gets."""
        return PROCESS + max(self.layer, self.share, self.block)

    def together(self, workers: int) -> int:
        """Bytes of so many workers in one process: one at a time calibrates alone, or adds up."""
        usual = max(self.layer, self.share)
        return PROCESS + max(self.block, usual) + (workers - 1) * usual


def footprint(
    plan: Plan,
    calibration: CalibrationSection,
    shards: int | None = 1,
    blocks_per_task: int | None = None,
    workers: int = 1,
    on_device: bool = False,
    fp8: bool = False,
) -> Footprint:
    """The prediction for a model's plan.

    Args:
        shards: tasks that share calibration; None: by its work and the workers.
        blocks_per_task: that a calibration task passes; None: by size.
        workers: tasks at a time.
        on_device: workers compute on devices with memory of their own.
        fp8: weights are stored so, and become 16 bits one after the other as they are read: the
            largest as it is stored, and what widening takes.
    """
    if shards is None:
        undivided = on_device or (blocks_per_task or 1) > 1
        shards = 1 if undivided else _shards_by_work(plan, calibration, workers)
    reading = WORKSPACE + max(each.weights for each in plan.layers) if fp8 else 0
    if blocks_per_task is None:
        blocks_per_task = _blocks_by_size(plan, calibration, shards)
    batch_size, leaves = _batch_size(calibration), _leaves(calibration)
    root = Node(0, leaves)
    nodes = [root.within(*each) for each in shares(leaves, shards)]
    sums = max(node.sums_alive() for each in nodes for node in each)
    blocks = range(plan.blocks)
    passes = max(_passes(plan, block, calibration, batch_size, sums) for block in blocks)
    by_turn = [_statistics(plan, block, calibration) for block in blocks]
    at_once, statistics = max(map(max, by_turn)), sum(map(sum, by_turn))
    alone = passes + blocks_per_task * at_once  # kept for the layers, and being written
    if blocks_per_task > 1:
        alone += _hidden(plan, calibration)
    begun = max(plan.reading, _BFLOAT16 * plan.embedding + _hidden(plan, calibration))
    alone, shared = max(alone + reading, begun), max(passes + reading, begun)
    added = root.sums_alive([node for each in nodes for node in each]) * at_once
    stored = sum(stored_bytes(each.rows, each.features, each.scheme) for each in plan.layers)
    corrected, of_layer = calibration.correction > 0, _on_host if on_device else layer_bytes
    return Footprint(
        layer=max(of_layer(each, corrected) for each in plan.layers) + reading,
        share=shared if shards > 1 else 0,
        block=added if shards > 1 else alone,
        disk=statistics + 2 * stored,  # layers lie in the store and in the checkpoint
        statistics=statistics,
        device=_device(plan, calibration, batch_size) if on_device else 0,
        shards=shards,
        blocks_per_task=blocks_per_task,
    )


def _shards_by_work(plan: Plan, calibration: CalibrationSection, workers: int) -> int:
    """One for each worker of a CPU, whose layers are made faster than a block is calibrated; but
    one where that takes a core little longer than five more tasks."""
    tokens = calibration.samples * calibration.sequence_length
    products = max(
        (
            2 * sum(each.weights for each in plan.of_block(block) if not each.outside)
            + sum({each.statistics: each.features**2 for each in plan.of_block(block)}.values())
        )
        // len(_turns(plan, block, calibration))
        for block in range(plan.blocks)
    )
    return min(workers, _leaves(calibration)) if tokens * products >= _MUCH_WORK else 1


_MUCH_WORK = 2e11  # multiplications and additions: of a core, 2 s (AMX) to 10 s (AVX2)


def _leaves(calibration: CalibrationSection) -> int:
    return leaf_count(calibration.counted_samples, _batch_size(calibration))


def _batch_size(calibration: CalibrationSection) -> int:
    return 1 if calibration.image_column else calibration.batch_size


def _blocks_by_size(plan: Plan, calibration: CalibrationSection, shards: int) -> int:
    """Few bytes go to the store at every block: then little is to be repeated after a crash."""
    if shards > 1 or calibration.propagation != "original":
        return 1
    return _MANY_BLOCKS if _hidden(plan, calibration) >= _MUCH else 1


_MUCH, _MANY_BLOCKS = 1 << 30, 8


def _hidden(plan: Plan, calibration: CalibrationSection) -> int:
    """Bytes of the hidden states of all samples before a block."""
    tokens = calibration.all_samples * calibration.sequence_length
    return tokens * plan.layers[0].features * _BFLOAT16


def _device(plan: Plan, calibration: CalibrationSection, batch_size: int) -> int:
    """Bytes of a GPU, at its largest layer, or running a batch through a block: its weights, a
    leaf's sums, activations."""
    corrected, length = calibration.correction > 0, calibration.sequence_length
    most = max(layer_bytes(each, corrected) for each in plan.layers)
    most = max(most, _BFLOAT16 * plan.embedding)
    for block in range(plan.blocks):
        layers = plan.of_block(block)
        weights = sum(each.weights for each in layers) * _BFLOAT16 * (2 if corrected else 1)
        activations = batch_size * length * max(map(_widest, layers)) * _per_input(corrected)
        most = max(most, weights + max(_statistics(plan, block, calibration)) + activations)
    return most + _WORKSPACE


_WORKSPACE = 64 << 20  # of cuBLAS and cuSOLVER beside tensors: 32 MiB each on Hopper


def _on_host(layer: PlannedLayer, corrected: bool) -> int:
    """Bytes of the host for a layer that a device quantizes: its statistics, its weight, what is
    stored of it."""
    return _FLOAT32 * layer.features**2 * (1 + corrected) + 2 * _BFLOAT16 * layer.weights


def _passes(
    plan: Plan, block: int, calibration: CalibrationSection, batch_size: int, sums: int
) -> int:
    """Bytes that running leaves through a block takes: its weights (with the codes of layers that
    are quantized already, and the 16-bit block beside it, where there are such), so many
    statistics, a leaf's hidden states before and after, those of the one before it that are being
    written, and what a batch's activations take."""
    layers, length = plan.of_block(block), calibration.sequence_length
    windows = min(calibration.counted_samples, batch_size * leaf_size(batch_size))
    leaf = (windows + calibration.unseen) * length
    corrected = calibration.correction > 0
    a_weight = _BFLOAT16 + (calibration.propagation == "groups") + _BFLOAT16 * corrected
    states = 3 * leaf * plan.layers[0].features * _BFLOAT16  # of the first layer of a block
    return (
        sum(each.weights for each in layers) * a_weight
        + sums * max(_statistics(plan, block, calibration))
        + states * (1 + corrected)
        + batch_size * length * max(map(_widest, layers)) * _per_input(corrected)
    )


def _per_input(corrected: bool) -> int:
    """Bytes an element of a batch's widest activation: the block's own in BF16, the input that is
    counted in float32, before, while and after it is rounded; the 16-bit model's, and how far it
    is away."""
    return 4 * _BFLOAT16 + 4 * _FLOAT32 + (_BFLOAT16 + 2 * _FLOAT32) * corrected


def layer_bytes(layer: PlannedLayer, corrected: bool = False) -> int:
    """Most memory that quantizing a layer takes, its weight and statistics included. Of one that is
    quantized by pieces: a piece, the weight as it was read, and what has come of all."""
    rows = rows_at_once(layer.rows, layer.scheme)
    weight, hessian = rows * layer.features, layer.features**2
    more = _FLOAT32 * 2 * hessian * corrected
    if rows < layer.rows:
        more += (_BFLOAT16 + 2 * _CODES) * layer.weights  # parts, and what is joined of them
    if layer.scheme.method == "none":
        return _FLOAT32 * (hessian + weight) + more
    if layer.scheme.bits == 8:
        return _FLOAT32 * (hessian + 6 * weight) + more
    return _FLOAT32 * max(4 * hessian + 2 * weight, 2 * hessian + 5 * weight) + more


def _statistics(plan: Plan, block: int, calibration: CalibrationSection) -> list[int]:
    """Bytes of the statistics of a block's inputs, those together that are counted at a time:
    Hessians, histograms, and tokens that no Hessian sees."""
    squares = 2 if calibration.correction else 1
    kept = _BFLOAT16 * UNSEEN * calibration.unseen
    return [
        sum(squares * _FLOAT32 * width**2 + kept * width + _INT64 * MAGNITUDES for width in widths)
        for widths in _turns(plan, block, calibration)
    ]


def _turns(plan: Plan, block: int, calibration: CalibrationSection) -> list[list[int]]:
    """Widths of a block's inputs, those together that are counted at a time."""
    widths = {layer.statistics: layer.features for layer in plan.of_block(block)}
    if calibration.propagation != "groups":
        return [list(widths.values())]
    return [[widths[name] for name in names] for names in plan.inputs_by_step(block)]


def _widest(layer: PlannedLayer) -> int:
    """Of a head the products are not made."""
    return layer.features if layer.outside else max(layer.rows, layer.features)
