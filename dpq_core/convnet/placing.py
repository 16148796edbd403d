"""Where activations are rounded, so that integers are what travels between layers.

    a tensor is rounded where it is computed by, or enters, an *integer operation*: a layer, an
    addition or product of two tensors, a concatenation
    a ReLU or ReLU6 that alone follows an integer operation goes before the rounding
    what only moves values (pooling of maxima, reshaping, slices) rounds to the grid of its input
    what a concatenation joins shares one grid, where all of it comes from the same activation or
    from none: a ReLU before a grid that goes below zero would be left beside the kernel
    the network's output is not rounded

Every tensor is rounded once, and all its readers read what was rounded. These are the places where
onnxruntime expects "quantize → dequantize" to compute what lies between in integers.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dpq_core.convnet.graph import aten, zeros_around
from dpq_core.convnet.grids import Rounding
from dpq_core.convnet.layer import Layer

_JOINING = (aten.cat.default,)
_OF_TWO = (aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor)
_ACTIVATIONS = (
    aten.relu.default,
    aten.relu_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.clamp.default,
    aten.clamp_min.default,
)
_MOVING = (
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.channel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.pixel_shuffle.default,
)
_PARTING = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
NOTHING = (aten.dropout.default, aten.feature_dropout.default, aten.alias.default)


def place_roundings(graph: GraphModule, make: Callable[[], Rounding]) -> None:
    """Insert a rounding behind every tensor that is to have one.

    Args:
        make: a new rounding.
    """
    _Placing(graph, make).run()


class _Placing:
    """One graph. Nodes that share a grid are joined to the first of them."""

    def __init__(self, graph: GraphModule, make: Callable[[], Rounding]) -> None:
        self.graph, self.make = graph, make
        self.joined: dict[Node, Node] = {}
        self.rounded: dict[Node, None] = {}  # in order

    def run(self) -> None:
        for node in self.graph.graph.nodes:
            if self._integer(node):
                for source in node.all_input_nodes:
                    self._round(source)
                self._round(self._behind_activation(node))
                if node.target in _JOINING:
                    self._share(node)
        modules: dict[Node, str] = {}
        for node in self.rounded:
            first = self._first(node)
            if first not in modules:
                modules[first] = f"rounding_{len(modules)}"
                self.graph.add_submodule(modules[first], self.make())
            with self.graph.graph.inserting_after(node):
                made = self.graph.graph.call_module(modules[first], ())
            node.replace_all_uses_with(made)
            made.args = (node,)
            made.meta = dict(node.meta)
        self.graph.recompile()

    def _integer(self, node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.graph.get_submodule(str(node.target)), Layer)
        tensors = [each for each in node.all_input_nodes if _is_activation(each)]
        if node.target in _JOINING:
            return len(tensors) == len(node.all_input_nodes)
        return node.target in _OF_TWO and len(node.args) > 1 and _both(node)

    def _round(self, node: Node) -> None:
        """And, where it only moves values, what it moves."""
        if node in self.rounded or not _is_activation(node) or _is_output(node):
            return
        if (source := _moved(node)) is not None:
            self._round(source)
            if source in self.rounded:
                self._join(source, node)
        self.rounded[node] = None

    def _behind_activation(self, node: Node) -> Node:
        users = list(node.users)
        alone = len(users) == 1 and users[0].target in _ACTIVATIONS
        return users[0] if alone else node

    def _share(self, node: Node) -> None:
        if len({_clamped(source) for source in node.all_input_nodes}) > 1:
            return
        for source in node.all_input_nodes:
            if source in self.rounded:
                self._join(node, source)

    def _first(self, node: Node) -> Node:
        while node in self.joined:
            node = self.joined[node]
        return node

    def _join(self, one: Node, other: Node) -> None:
        first, second = self._first(one), self._first(other)
        if first is not second:
            self.joined[second] = first


def _clamped(node: Node) -> str:
    """The activation whose values a tensor holds; none where there are several, or none."""
    if node.target in _ACTIVATIONS:
        return f"{node.target}{node.args[1:]}"
    if (source := _moved(node)) is not None:
        return _clamped(source)
    if node.target in _JOINING:
        kinds = {_clamped(each) for each in node.all_input_nodes}
        return kinds.pop() if len(kinds) == 1 else ""
    return ""


def _is_activation(node: Node) -> bool:
    """A tensor of numbers that depends on the pixels."""
    value = node.meta.get("val")
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return floating and node.op != "get_attr"


def _both(node: Node) -> bool:
    """Whether both factors or terms are tensors of pixels."""
    return all(isinstance(each, Node) and _is_activation(each) for each in node.args[:2])


def _is_output(node: Node) -> bool:
    """Of the network, as it is or moved."""
    users = list(node.users)
    return any(user.op == "output" or (_moved(user) is node and _is_output(user)) for user in users)


def _moved(node: Node) -> Node | None:
    """What a node moves the values of; None where it computes others."""
    if node.target in _MOVING or zeros_around(node):
        return node.all_input_nodes[0]
    if node.target is operator.getitem and (parts := node.all_input_nodes[0]).target in _PARTING:
        return parts.all_input_nodes[0]
    return None


def strip(graph: GraphModule) -> None:
    """Take out what does nothing in inference: dropout, copies."""
    for node in list(graph.graph.nodes):
        if node.target in NOTHING:
            source: Any = node.args[0]
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
    graph.recompile()
