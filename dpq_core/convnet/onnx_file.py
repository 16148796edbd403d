"""A graph that rounds as an ONNX file of operations that every runtime knows:

    activations   QuantizeLinear → DequantizeLinear, uint4, uint8 or uint16
    weights       codes as int4, int8 or int16 → DequantizeLinear, per channel
    biases        int32 → DequantizeLinear, with scale s_x · s_w, beside integer weights and inputs

torch.onnx translates ATen's operations; a rounding passes through it as an operation of our own,
`dpq::Round`, and becomes the above here. Names that torch gives, and where in the source a node
comes from, are left out: they would be a tenth of a small file.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor
from torch.fx import GraphModule

from dpq_core.convnet.graph import exported
from dpq_core.convnet.grids import ROUND

OPSET = 21  # the first with 4 and 16 bits
INPUT, OUTPUT = "pixels", "logits"
_LAYERS = {"Conv": 2, "Gemm": 2}  # place of the bias
_TYPES = {  # (signed, bits of storage)
    (False, 4): TensorProto.UINT4,
    (False, 8): TensorProto.UINT8,
    (False, 16): TensorProto.UINT16,
    (True, 4): TensorProto.INT4,
    (True, 8): TensorProto.INT8,
    (True, 16): TensorProto.INT16,
}


def write_onnx(graph: GraphModule, example: Tensor, path: Path, about: Mapping[str, str]) -> None:
    """Write a settled graph.

    Args:
        example: an input, of two images. about: kept in the file's metadata.
    """
    model = _translated(graph, example)
    _Writer(model.graph).run()
    _plain(model)
    helper.set_model_props(model, dict(about))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _translated(graph: GraphModule, example: Tensor) -> ModelProto:
    program = exported(graph, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    assert made is not None
    return made.model_proto


class _Writer:
    """One graph, whose `Round` nodes become integers."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.grids: dict[str, tuple[str, str]] = {}  # dequantized tensor → scale, zero point
        self.rounded_weights: set[str] = set()
        self.nodes: list[NodeProto] = []

    def run(self) -> None:
        for node in self.graph.node:
            if f"{node.domain}::{node.op_type}" == ROUND:
                self._round(node)
            else:
                if node.op_type in _LAYERS:
                    self._round_bias(node)
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        self._drop_unused()

    def _round(self, node: NodeProto) -> None:
        about = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        x, scale, zero = node.input
        kind = _storage(about["low"], about["high"])
        scales, zeros = self.constants[scale], self.constants[zero]
        axis: int | None = 0
        if len(scales) == 1:
            axis, scales, zeros = None, scales[0], zeros[0]
        name = node.output[0]
        self._add(f"{name}.scale", scales)
        self._add_codes(f"{name}.zero", zeros, kind)
        self.grids[name] = f"{name}.scale", f"{name}.zero"
        if x in self.constants:
            codes = _codes(self.constants[x], scales, zeros, axis, about["low"], about["high"])
            self._add_codes(f"{name}.codes", codes, kind)
            self.rounded_weights.add(name)
        else:
            self._node("QuantizeLinear", [x, *self.grids[name]], f"{name}.codes", axis)
        self._node("DequantizeLinear", [f"{name}.codes", *self.grids[name]], name, axis)

    def _round_bias(self, node: NodeProto) -> None:
        """Of a layer of integers: int32, by the scale of its products."""
        place = _LAYERS[node.op_type]
        x, weight = node.input[:2]
        bias = node.input[place] if len(node.input) > place else ""
        if bias not in self.constants or weight not in self.rounded_weights or x not in self.grids:
            return
        scale = self.constants[self.grids[x][0]] * self.constants[self.grids[weight][0]]
        codes = np.rint(self.constants[bias].astype(np.float64) / scale)
        limit = 2**31 - 1
        name, axis = f"{node.output[0]}.bias", 0 if scale.ndim else None
        self._add(f"{name}.scale", scale.astype(np.float32))
        self._add(f"{name}.codes", codes.clip(-limit, limit).astype(np.int32))
        self._node("DequantizeLinear", [f"{name}.codes", f"{name}.scale"], name, axis)
        node.input[place] = name

    def _node(self, kind: str, inputs: list[str], output: str, axis: int | None) -> None:
        more = {} if axis is None else {"axis": axis}
        self.nodes.append(helper.make_node(kind, inputs, [output], **more))

    def _add(self, name: str, values: NDArray[Any]) -> None:
        self.constants[name] = values
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))

    def _add_codes(self, name: str, codes: NDArray[Any], kind: int) -> None:
        values = np.asarray(codes).astype(helper.tensor_dtype_to_np_dtype(kind))
        self.graph.initializer.append(numpy_helper.from_array(values, name))

    def _drop_unused(self) -> None:
        used = {name for node in self.graph.node for name in node.input}
        kept = [each for each in self.graph.initializer if each.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def _codes(
    x: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any], axis: int | None, low: int, high: int
) -> NDArray[Any]:
    if axis is not None:
        shape = [-1 if dimension == axis else 1 for dimension in range(x.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    codes: NDArray[Any] = (np.rint(x / scale) + zero).clip(low, high)
    return codes


def _storage(low: int, high: int) -> int:
    """The smallest type that holds the codes."""
    for signed, bits in _TYPES:
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        if signed == (low < 0) and least <= low and high <= most:
            return int(_TYPES[signed, bits])
    raise ValueError(f"codes of {low} … {high} have no type of 4, 8 or 16 bits")


def _plain(model: ModelProto) -> None:
    """Short names, and no traces of the source."""
    graph = model.graph
    fixed = {each.name for each in [*graph.input, *graph.output]}
    short: dict[str, str] = {"": ""}

    def renamed(name: str) -> str:
        if name in fixed:
            return name
        return short.setdefault(name, f"{len(short):x}")

    for node in graph.node:
        node.name = ""
        node.doc_string = ""
        del node.metadata_props[:]
        for names in (node.input, node.output):
            names[:] = [renamed(name) for name in names]
    for each in graph.initializer:
        each.name = renamed(each.name)
        each.doc_string = ""
        del each.metadata_props[:]
    del graph.value_info[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]
    for each in [*graph.input, *graph.output]:
        del each.metadata_props[:]
    graph.doc_string = ""
    kept = [each for each in model.opset_import if each.domain in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend(kept)
