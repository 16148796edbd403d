"""Sums over calibration leaves: one tree, the same bytes however the leaves are shared."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_core.calibration.reduction_tree import WINDOWS, Node, leaf_count, leaves_of, shares, summed
from dpq_core.calibration.statistics import InputRounding, TokenWeights, calibrate_block
from dpq_core.model.inputs import batches_of
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import CalibrationSection
from dpq_core.recipe.scheme import Scheme


def sums_of(count, seed=0):
    """Of leaves, as Hessians are: FP32 values whose sum depends on the order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 64, generator=generator) * 10 ** torch.rand(count, 1)


def add(left, right):
    return left + right


@given(st.integers(1, 40), st.data(), st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_any_number_of_tasks_gives_the_bytes_of_one(count, data, seed):
    leaves, root = sums_of(count, seed), Node(0, count)
    whole = summed(root, lambda n: leaves[n], add)
    tasks = data.draw(st.integers(1, count))
    made = {}
    for first, last in data.draw(st.permutations(shares(count, tasks))):
        for node in root.within(first, last):
            assert node not in made
            made[node] = summed(node, lambda n: leaves[n], add)

    def no_leaf_is_left(number):
        raise AssertionError(number)

    assert torch.equal(summed(root, no_leaf_is_left, add, made.get), whole)


def test_another_order_gives_other_bytes():
    leaves = sums_of(8)
    whole = summed(Node(0, 8), lambda n: leaves[n], add)
    assert not torch.equal(sum(leaves), whole)
    torch.testing.assert_close(leaves.sum(0), whole)


def most_alive(root, given=()):
    """Sums that are there at a time, counted, while a node is summed whose leaves are their own."""
    alive, most = set(), 0

    def made(leaves):
        nonlocal most
        alive.add(leaves)
        most = max(most, len(alive))
        return leaves

    def joined(left, right):
        alive.difference_update({left, right})
        return made(left + right)

    def found(node):
        return made(tuple(range(*node))) if node in given else None

    assert summed(root, lambda n: made((n,)), joined, found) == tuple(range(*root))
    return most


@pytest.mark.parametrize("count", [*range(1, 18), 100, 128])
def test_the_tree_holds_every_leaf_once_and_few_sums_at_a_time(count):
    root = Node(0, count)
    assert most_alive(root) == root.sums_alive() <= 1 + math.floor(math.log2(count))
    assert len(list(root.tree())) == len(set(root.tree())) == 2 * count - 1


@given(st.integers(1, 60), st.data())
@settings(deadline=None)
def test_shares_are_equal_and_their_nodes_make_up_the_tree(count, data):
    root = Node(0, count)
    ranges = shares(count, data.draw(st.integers(1, count)))
    sizes = {last - first for first, last in ranges}
    assert max(sizes) - min(sizes) <= 1
    nodes = [node for each in ranges for node in root.within(*each)]
    assert [n for node in nodes for n in range(*node)] == list(range(count))
    assert most_alive(root, nodes) == root.sums_alive(nodes)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16, 20])
@pytest.mark.parametrize("samples", [1, 8, 16, 17, 128])
def test_leaves_depend_on_samples_and_batch_size_alone(samples, batch_size):
    batches = batches_of(torch.zeros(samples, 4, dtype=torch.int64), batch_size)
    leaves = leaves_of(batches, batch_size)
    assert len(leaves) == leaf_count(samples, batch_size)
    assert [batch for leaf in leaves for batch in leaf] == batches
    windows = [sum(len(batch["input_ids"]) for batch in leaf) for leaf in leaves]
    assert all(WINDOWS <= n < WINDOWS + batch_size for n in windows[:-1])


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(activations="dynamic")])
def test_statistics_are_sums_over_leaves(quickstart_model, scheme):
    """Of three leaves, each calibrated as if it were all, with the scales of all."""
    windows = torch.randint(256, (2 * WINDOWS + 4, 8), generator=torch.Generator().manual_seed(0))
    section = CalibrationSection(dataset={"path": "python_docs"}, batch_size=4)
    stream = StreamedModel(quickstart_model)
    rounding = InputRounding.of(scheme, section)
    batches = stream.begin(batches_of(windows, 4))
    together = calibrate_block(
        stream, 0, batches, rounding, TokenWeights.of(section), advance=False
    )
    apart = [
        calibrate_block(stream, 0, leaf, rounding, TokenWeights.of(section), advance=False)
        for leaf in leaves_of(batches, 4)
    ]
    assert len(apart) == 3
    for name, statistics in together.items():
        one, two, three = (each[name] for each in apart)
        counted = one.magnitudes + two.magnitudes + three.magnitudes
        assert torch.equal(statistics.magnitudes, counted)
        assert statistics.tokens == one.tokens + two.tokens + three.tokens == windows.numel()
        if scheme.activations == "dynamic":
            tree = (one.hessian_sum + two.hessian_sum) + three.hessian_sum
            assert torch.equal(statistics.hessian_sum, tree)


@pytest.mark.parametrize(
    ("counted", "uncounted", "sizes"), [(8, 2, [4, 6]), (6, 1, [4, 3]), (2, 3, [5]), (4, 0, [4])]
)
def test_what_is_in_no_sum_is_with_the_last_leaf(counted, uncounted, sizes):
    batches = list(range(counted + uncounted))
    leaves = leaves_of(batches, 4, uncounted)
    assert [len(leaf) for leaf in leaves] == sizes
    assert [each for leaf in leaves for each in leaf] == batches
    assert len(leaves) == leaf_count(4 * counted, 4)
    assert leaves_of([], 4, uncounted) == []
