"""A network as a graph whose convolutions and linear layers are modules that can be rounded.

torch.export gives a graph of ATen's operations, whatever classes a network is written in: a
convolution that pads by itself, an activation that is used ten times, a swish of one's own are the
operations that they compute. Here

- what depends on parameters alone is computed once (a weight that is standardized, say);
- a convolution or linear layer becomes a `Layer`, with the zeros that are padded before it, and the
  batch norm behind it;
- what does not become one is named with its reason.
"""

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, Node
from torch.nn import functional

from dpq_core.convnet.layer import BatchNorm, Layer
from dpq_core.errors import InputError, one_line

_MOST_IMAGES = 2**16  # at a time

aten = torch.ops.aten
OPERATIONS: dict[Any, Callable[..., Tensor]] = {
    aten.conv1d.default: functional.conv1d,
    aten.conv2d.default: functional.conv2d,
    aten.conv3d.default: functional.conv3d,
    aten.conv1d.padding: functional.conv1d,  # padding by name, "same"
    aten.conv2d.padding: functional.conv2d,
    aten.conv3d.padding: functional.conv3d,
    aten.linear.default: functional.linear,
}
_NOT_QUANTIZED = {
    aten.conv_transpose1d.default: "transposed convolutions have no integer kernels",
    aten.conv_transpose2d.input: "transposed convolutions have no integer kernels",
    aten.conv_transpose3d.input: "transposed convolutions have no integer kernels",
    aten.matmul.default: "both factors are activations",
    aten.bmm.default: "both factors are activations",
    aten.scaled_dot_product_attention.default: "both factors are activations",
}
_BATCH_NORM = aten.batch_norm.default
_PADDINGS = (aten.pad.default, aten.constant_pad_nd.default)


class ExportError(InputError):
    """A network that torch.export does not take."""


@dataclass(frozen=True)
class Prepared:
    """graph: its convolutions and linear layers are `Layer`s. left: those that stay in floating
    point → why."""

    graph: GraphModule
    left: dict[str, str]

    @property
    def layers(self) -> dict[str, Layer]:
        """By the names that they have in the network."""
        return {str(name): m for name, m in layers_of(self.graph)}


def prepared(network: nn.Module, example: Tensor) -> Prepared:
    """The network's graph, in inference, for any number of images. The network stays as it is.

    Raises:
        ExportError: torch.export's first line.
    """
    graph = _plain(network, example)
    _fold_constants(graph)
    left = {}
    for node in list(graph.graph.nodes):
        if node.target in OPERATIONS:
            if reason := _reason(node):
                left[_name(node)] = reason
            else:
                _make_layer(graph, node)
        elif node.target in _NOT_QUANTIZED:
            left[_name(node)] = _NOT_QUANTIZED[node.target]
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return Prepared(graph, left)


def exported(network: nn.Module, example: Tensor) -> ExportedProgram:
    """As torch.export takes it, for any number of images."""
    shapes = ({0: Dim("batch", min=1, max=_MOST_IMAGES)},)
    return export(network, (example,), dynamic_shapes=shapes)


def layers_of(graph: GraphModule) -> Iterator[tuple[str, Layer]]:
    """Name in the network, and module, in the order in which they are computed."""
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = graph.get_submodule(node.target)
            if isinstance(module, Layer):
                yield module.name, module


def _plain(network: nn.Module, example: Tensor) -> GraphModule:
    """A graph of ATen's operations that is no exported program's any more: it trains."""
    if isinstance(network, GraphModule):  # an archive's
        graph = copy.deepcopy(network)
    else:
        try:
            program = exported(network.eval(), example)
        except Exception as error:  # of the compiler's many
            raise ExportError(f"the network does not export: {one_line(error, 300)}") from error
        graph = copy.deepcopy(program.module(check_guards=False))
    return GraphModule(graph, graph.graph)


def _fold_constants(graph: GraphModule) -> None:
    """Operations on parameters and buffers alone become buffers. A batch norm's are left."""
    for node in list(graph.graph.nodes):
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs:
            continue
        if all(each.op == "get_attr" for each in inputs):
            values = {each: _attribute(graph, each) for each in inputs}
            arguments = torch.fx.map_arg(node.args, values.__getitem__)
            keywords = torch.fx.map_arg(node.kwargs, values.__getitem__)
            with torch.no_grad():
                found = node.target(*arguments, **keywords)
            if not isinstance(found, Tensor):
                continue
            name = f"constant_{node.name}"
            graph.register_buffer(name, found.detach().clone())
            with graph.graph.inserting_before(node):
                made = graph.graph.get_attr(name)
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            graph.graph.erase_node(node)


def _reason(node: Node) -> str | None:
    """Why an operation is no `Layer`, None where it is."""
    weight = node.args[1]
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return "its weight is computed from activations"
    bias = _argument(node, 2)
    if bias is not None and bias.op != "get_attr":
        return "its bias is computed from activations"
    return None


def _make_layer(graph: GraphModule, node: Node) -> None:
    """A `Layer` for an operation, the padding before it and the batch norm behind it."""
    source, last = cast(Node, node.args[0]), node
    weight, bias = _tensor(graph, node.args[1]), _tensor(graph, _argument(node, 2))
    pads: tuple[int, ...] = ()
    if (found := zeros_around(source)) and node.target is not aten.linear.default:
        pads, source = found, cast(Node, source.args[0])
    norm = None
    users = list(node.users)
    if len(users) == 1 and users[0].target is _BATCH_NORM and users[0].args[0] is node:
        last = users[0]
        norm = _batch_norm(graph, last)
    rest = tuple(node.args[3:])
    layer = Layer(_name(node), OPERATIONS[node.target], weight, bias, rest, pads, norm)
    place = f"layer_{node.name}"
    graph.add_submodule(place, layer)
    with graph.graph.inserting_before(last):
        made = graph.graph.call_module(place, (source,))
    made.meta = dict(last.meta)
    last.replace_all_uses_with(made)
    graph.graph.erase_node(last)
    if last is not node:
        graph.graph.erase_node(node)


def zeros_around(node: Node) -> tuple[int, ...]:
    """The padding that a node is, of zeros and of pixels alone; else none."""
    if node.target not in _PADDINGS:
        return ()
    if node.target is aten.pad.default and _argument(node, 2, "constant") != "constant":
        return ()
    value = _argument(node, 3 if node.target is aten.pad.default else 2) or 0
    pads = tuple(cast(Any, node.args[1]))
    known = all(isinstance(pad, int) and pad >= 0 for pad in pads)
    return pads if value == 0 and known and len(pads) <= 2 * (_dimensions(node) - 2) else ()


def _batch_norm(graph: GraphModule, node: Node) -> BatchNorm:
    gamma, beta, mean, variance = (_tensor(graph, each) for each in node.args[1:5])
    assert mean is not None
    assert variance is not None
    momentum, eps = cast(float, node.args[6]), cast(float, node.args[7])
    return BatchNorm(gamma, beta, mean, variance, momentum, eps)


def _name(node: Node) -> str:
    """Of a layer in the network: its weight's without the last word."""
    weight = node.args[1] if len(node.args) > 1 else None
    if isinstance(weight, Node) and weight.op == "get_attr":
        return str(weight.target).rpartition(".")[0] or str(weight.target)
    stack = node.meta.get("nn_module_stack") or {}
    module = [path for path, _ in stack.values()][-1:] or [""]
    return f"{module[0]} ({node.name})" if module[0] else node.name


def _argument(node: Node, place: int, default: Any = None) -> Any:
    """By place or by name, in ATen's order."""
    if len(node.args) > place:
        return node.args[place]
    schema = cast(Any, node.target)._schema.arguments[place]
    return node.kwargs.get(schema.name, default)


def _tensor(graph: GraphModule, node: Any) -> Tensor | None:
    return None if node is None else _attribute(graph, node)


def _attribute(graph: GraphModule, node: Node) -> Tensor:
    return cast(Tensor, operator.attrgetter(str(node.target))(graph))


def _dimensions(node: Node) -> int:
    return int(node.meta["val"].dim())
