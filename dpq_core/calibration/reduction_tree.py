"""The fixed plan by which sums over calibration windows are made, whoever makes them.

Sums of floating-point numbers depend on their order. So the batches are cut into leaves, runs of
batches that hold at least `WINDOWS` windows, and the leaves' sums are added along one binary tree:

    a node is a range of leaves [first, last); its sum is its left child's plus its right child's
    the left child has the largest power of two of leaves that is less than the node's

Neither depends on how many tasks share the work: a task has a range of leaves, hence some nodes of
the same tree, and a node's sum has the same bytes wherever it is made. Depth first, no more than
1 + ⌊log₂ leaves⌋ sums are alive at a time.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

WINDOWS = 16  # of a leaf at least: a Hessian a leaf is written, read and added where tasks share

_Sum = TypeVar("_Sum")
_Batch = TypeVar("_Batch")


class Node(NamedTuple):
    """Leaves first … last - 1."""

    first: int
    last: int

    def children(self) -> tuple["Node", "Node"]:
        """Left and right, of a node with two leaves or more."""
        left = 1 << ((self.last - self.first - 1).bit_length() - 1)
        return Node(self.first, self.first + left), Node(self.first + left, self.last)

    def tree(self) -> Iterator["Node"]:
        """This node and all below it."""
        yield self
        if self.last - self.first > 1:
            for child in self.children():
                yield from child.tree()

    def within(self, first: int, last: int) -> list["Node"]:
        """The fewest nodes of this one's tree that make up its leaves in [first, last)."""
        if first <= self.first and self.last <= last:
            return [self]
        if last <= self.first or self.last <= first:
            return []
        return [node for child in self.children() for node in child.within(first, last)]

    def sums_alive(self, given: Collection["Node"] = ()) -> int:
        """Most sums that `summed` has at a time; `given`: nodes whose sums are found."""
        if self in given or self.last - self.first == 1:
            return 1
        left, right = self.children()
        return max(left.sums_alive(given), 1 + right.sums_alive(given))


def leaf_size(windows: int) -> int:
    """Batches of a leaf, with so many windows a batch."""
    return -(-WINDOWS // windows)


def leaf_count(samples: int, batch_size: int) -> int:
    """Leaves of so many windows in batches of `batch_size`."""
    return -(-samples // (batch_size * leaf_size(batch_size)))


def leaves_of(
    batches: Sequence[_Batch], windows: int, uncounted: int = 0
) -> list[Sequence[_Batch]]:
    """Batches by leaf, with `windows` a batch (the last may have fewer). The last `uncounted` of
    them, which are in no sum, are with the last leaf."""
    size = leaf_size(windows)
    starts = range(0, len(batches) - uncounted, size)
    return [batches[start : None if start == starts[-1] else start + size] for start in starts]


def shares(leaves: int, tasks: int) -> list[tuple[int, int]]:
    """Ranges of leaves [first, last) for so many tasks, equal to within one."""
    cuts = [leaves * task // tasks for task in range(tasks + 1)]
    return list(pairwise(cuts))


def summed(
    node: Node,
    leaf: Callable[[int], _Sum],
    add: Callable[[_Sum, _Sum], _Sum],
    found: Callable[[Node], _Sum | None] = lambda node: None,
) -> _Sum:
    """The sum of a node, by the tree.

    Args:
        leaf: a leaf's sum, by its number; called in order.
        add: the sum of a left child and a right child, which are not used again.
        found: the sum of a node that was made before, or None.
    """
    if (known := found(node)) is not None:
        return known
    if node.last - node.first == 1:
        return leaf(node.first)
    left, right = node.children()
    first = summed(left, leaf, add, found)
    return add(first, summed(right, leaf, add, found))
