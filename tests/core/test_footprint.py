import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpq_core.footprint import PROCESS, footprint, layer_bytes
from dpq_core.model.plan import plan_layers
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import CalibrationSection
from dpq_core.recipe.scheme import Scheme


@pytest.fixture(scope="module")
def plan(quickstart_model):
    return plan_layers(StreamedModel(quickstart_model), Scheme())


def calibration(**changes):
    return CalibrationSection(dataset={"path": "python_docs"}, **{"unseen": 0} | changes)


def test_each_part_grows_with_what_it_is_made_of(plan):
    few, many = (footprint(plan, calibration(samples=samples, batch_size=4)) for samples in (8, 16))
    hidden = 8 * calibration().sequence_length * plan.layers[0].features * 2
    assert many.block - few.block == 3 * hidden  # before and after a block, and being written
    assert many.disk == few.disk
    assert many.layer == few.layer == max(map(layer_bytes, plan.layers))


def test_samples_beyond_a_leaf_take_a_sum_each_time_that_they_double(plan):
    one, two, three, four, eight = (
        footprint(plan, calibration(samples=16 * leaves)).block for leaves in (1, 2, 3, 4, 8)
    )
    assert two - one == four - two == eight - four == largest_statistics(plan)
    assert three == two


def test_tasks_that_share_calibration_take_what_one_took(plan):
    alone = footprint(plan, calibration(samples=128))
    shared = {n: footprint(plan, calibration(samples=128), shards=n) for n in (2, 3, 8)}
    assert alone.share == 0
    sums = {1: 5, 2: 3, 3: 2, 8: 1}  # of 8, 4, 2 (and 1), and 1 leaves; alone also those written
    for n, each in shared.items():
        assert alone.block - each.share == (sums[1] - sums[n]) * largest_statistics(plan)
        assert each.worker == PROCESS + max(each.layer, each.share, each.block)
        assert each.shards == n
        assert each.together(3) == each.worker + 2 * max(each.layer, each.share)
        assert (each.layer, each.disk) == (alone.layer, alone.disk)
    assert [shared[n].block // largest_statistics(plan) for n in (2, 3, 8)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("samples", "workers", "settings", "shards"),
    [
        (32, 2, {}, 1),  # done in less than a second
        (1024, 2, {}, 2),
        (1024, 3, {"blocks_per_task": 1}, 3),
        (1024, 1, {}, 1),
        (1024, 2, {"on_device": True}, 1),
        (1024, 2, {"blocks_per_task": 4}, 1),
    ],
)
def test_workers_share_the_calibration_of_blocks_that_take_long(
    plan, samples, workers, settings, shards
):
    section = calibration(samples=samples)
    found = footprint(plan, section, shards=None, workers=workers, **settings)
    assert found == footprint(plan, section, shards=shards, **settings)
    assert found.shards == shards


def largest_statistics(plan):
    """Bytes of a block's Hessians and histograms."""
    features = {layer.statistics: layer.features for layer in plan.of_block(0)}
    return sum(4 * n**2 + 8 * 2**15 for n in features.values())


def test_windows_that_no_hessian_sees_are_run_and_some_of_their_tokens_kept(plan):
    without, seen = (footprint(plan, calibration(samples=16, unseen=n)) for n in (0, 2))
    features = {layer.statistics: layer.features for layer in plan.of_block(0)}
    kept = 2 * 2 * 128 * sum(features.values())
    hidden = 2 * calibration().sequence_length * plan.layers[0].features * 2
    assert seen.block - without.block == 3 * hidden + 2 * kept  # counted, and being written
    assert seen.statistics - without.statistics == plan.blocks * kept


def test_a_layer_s_weight_or_its_hessian_decides(plan):
    layer = plan.layers[0]
    tall, wide = (replace(layer, rows=r, features=f) for r, f in ((4096, 512), (512, 4096)))
    assert layer_bytes(tall) == 4 * (2 * 512**2 + 5 * 512 * 4096)
    assert layer_bytes(wide) == 4 * (4 * 4096**2 + 2 * 512 * 4096)


def test_fewer_steps_take_less(plan):
    shapes = [
        layer_bytes(replace(plan.layers[0], scheme=scheme))
        for scheme in (Scheme(method="none"), Scheme(bits=8), Scheme())
    ]
    assert shapes == sorted(shapes)


def test_blocks_that_a_task_passes_together_keep_their_hidden_states(plan):
    section = calibration(samples=128)
    hidden = 128 * section.sequence_length * plan.layers[0].features * 2
    one, many = (footprint(plan, section, blocks_per_task=n) for n in (1, 4))
    assert many.block - one.block == hidden + 3 * largest_statistics(plan)
    assert footprint(plan, section).blocks_per_task == 1  # they are small
    large = calibration(samples=2**30 // (section.sequence_length * plan.layers[0].features * 2))
    assert footprint(plan, large).blocks_per_task == 8
    waiting = large.model_copy(update={"propagation": "quantized"})
    assert footprint(plan, waiting).blocks_per_task == 1
    assert footprint(plan, large, shards=2).blocks_per_task == 1


def test_a_device_holds_a_layer_or_a_batch_in_a_block(plan):
    section = calibration(samples=16, batch_size=4, sequence_length=2)
    small = footprint(plan, section, on_device=True)
    largest = max(map(layer_bytes, plan.layers))
    assert small.device - largest == 64 << 20  # of libraries
    assert small.layer < footprint(plan, section).layer  # the host has what the device does not
    long = footprint(plan, calibration(samples=16, batch_size=4), on_device=True)
    longer = footprint(plan, calibration(samples=16, batch_size=8), on_device=True)
    widest = max(max(layer.rows, layer.features) for layer in plan.layers)
    assert longer.device - long.device == 4 * 2048 * widest * 24
    assert footprint(plan, section).device == 0


def test_groups_one_after_the_other_take_the_sums_of_one(plan):
    blocks, groups = (
        footprint(plan, calibration(samples=128, propagation=fed))
        for fed in ("quantized", "groups")
    )
    widest = max(4 * layer.features**2 + 8 * 2**15 for layer in plan.of_block(0))
    codes = sum(layer.weights for layer in plan.of_block(0))
    assert blocks.block - groups.block == 5 * (largest_statistics(plan) - widest) - codes
    assert (groups.disk, groups.layer, groups.share) == (blocks.disk, blocks.layer, blocks.share)
    assert groups.blocks_per_task == 1


def test_a_correction_takes_two_models_and_two_moments(plan):
    section = calibration(samples=8, propagation="groups")
    plain = footprint(plan, section)
    section = section.model_copy(update={"correction": 0.5})
    corrected = footprint(plan, section)
    squares = {layer.statistics: 4 * layer.features**2 for layer in plan.layers}
    assert corrected.statistics - plain.statistics == sum(squares.values())
    assert corrected.disk - plain.disk == sum(squares.values())
    hidden = 8 * section.sequence_length * plan.layers[0].features * 2
    widest = max(max(layer.rows, layer.features) for layer in plan.layers)
    beside = 2 * sum(layer.weights for layer in plan.of_block(0))
    activations = 4 * section.sequence_length * widest * 10
    moments = 2 * max(squares.values())  # being summed, and written
    assert corrected.block - plain.block == 3 * hidden + beside + activations + moments
    for layer in plan.layers:
        more = layer_bytes(layer, corrected=True) - layer_bytes(layer)
        assert more == 2 * 4 * layer.features**2
    on = {"on_device": True}
    assert (
        footprint(plan, section, **on).device > footprint(plan, calibration(samples=8), **on).device
    )


def test_an_embedding_may_outweigh_all_else(plan):
    section = calibration(samples=16)
    wide = replace(plan, embedding=10**9, reading=4 * 10**9)
    assert footprint(wide, section).block == 4 * 10**9  # the file, and memory of its own
    assert footprint(wide, section, shards=2).share == 4 * 10**9
    assert footprint(wide, section, on_device=True).device == 2 * 10**9 + (64 << 20)
    hidden = 16 * section.sequence_length * plan.layers[0].features * 2
    many = replace(plan, embedding=10**9, reading=0)
    assert footprint(many, section).block == 2 * 10**9 + hidden
    assert footprint(plan, section).block > plan.reading  # a small vocabulary changes nothing


@pytest.mark.parametrize(("dtype", "each"), [(torch.bfloat16, 4), (torch.float32, 10)])
def test_what_is_read_is_mapped_and_copied(quickstart_model, tmp_path, dtype, each):
    shutil.copytree(quickstart_model, tmp_path, dirs_exist_ok=True)
    (shard,) = tmp_path.glob("*.safetensors")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(shard).items()}
    embedded = tensors["model.embed_tokens.weight"].numel()
    block = sum(t.numel() for name, t in tensors.items() if name.startswith("model.layers.0."))
    save_file(tensors, shard, metadata={"format": "pt"})
    found = plan_layers(StreamedModel(tmp_path), Scheme())
    assert found.embedding == embedded
    assert found.reading == each * max(embedded, block)
