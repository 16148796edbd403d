"""A quantized classifier on disk: a file that onnxruntime runs as it is, on whatever machine.

model.onnx       the graph, codes, scales (`dpq_core.convnet.onnx_file`); its metadata say how a
                 picture becomes its input, and what its classes are called
manifest.json    format version, scheme, input and classes, bytes of the file and of the weights
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor

from dpq_core.convnet.files import MANIFEST, MODEL
from dpq_core.convnet.graph import Prepared
from dpq_core.convnet.onnx_file import write_onnx
from dpq_core.digests import write_json
from dpq_core.errors import InputError, one_line

_FORMAT_VERSION = 2
_HALF_BYTES = (TensorProto.INT4, TensorProto.UINT4)
_LAYERS = ("Conv", "Gemm", "MatMul")
_FLOAT_BYTES = 4


class ArtifactError(InputError):
    """An artifact that cannot be used, with the file."""


@dataclass(frozen=True)
class WeightSizes:
    """Sizes of the weights of convolutions and linear layers, and of the file that holds them.

    float_bytes: in fp32. stored_bytes: of codes as they are stored (fp32 where a layer was left
    alone). grid_bytes: of scales and zero points. file_bytes: of model.onnx, with biases and graph.
    float_layers: those that were left alone.
    """

    float_bytes: int
    stored_bytes: int
    grid_bytes: int
    file_bytes: int
    float_layers: tuple[str, ...]

    def ratio(self, float_file: int) -> float:
        """How many times smaller the file is than the float network's of so many bytes."""
        return float_file / self.file_bytes


def save_classifier(folder: Path, made: Prepared, example: Tensor, about: Any) -> None:
    """Write a settled graph; `about` is kept in the manifest, and its `pictures` and `names` in the
    file too.

    Args:
        example: an input, of two images.
    """
    path = folder / MODEL
    told = {name: json.dumps(about[name]) for name in ("pictures", "names") if name in about}
    write_onnx(made.graph, example, path, told)
    alone = [name for name, layer in made.layers.items() if layer.rounding is None]
    left = (*alone, *made.left)
    content = {
        "format_version": _FORMAT_VERSION,
        "input": {"shape": list(example.shape[1:])},
        "weights": asdict(weight_sizes(path, left)),
        "left": made.left,
        **about,
    }
    write_json(folder / MANIFEST, content)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        ArtifactError: none there, or of another format version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder}: no {MANIFEST}: not a quantized classifier")
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if content.get("format_version") != _FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format version {content.get('format_version')} is unknown: this release"
            f" reads {_FORMAT_VERSION}"
        )
    return content


def open_model(path: Path) -> ModelProto:
    """A file's content.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # of protobuf
        raise ArtifactError(f"{path}: unreadable: {one_line(error, 300)}") from error


def weight_sizes(path: Path, left: tuple[str, ...] = ()) -> WeightSizes:
    """What a file's weights take, read off its tensors. left: layers in floating point."""
    graph = open_model(path).graph
    tensors = {each.name: each for each in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    total = stored = grids = 0
    for node in graph.node:
        if node.op_type not in _LAYERS:
            continue
        name = node.input[1]
        if name not in tensors and name in makers:
            name, *grid = makers[name].input
            grids += sum(_stored(tensors[each]) for each in grid if each in tensors)
        if name in tensors:
            total += _FLOAT_BYTES * math.prod(tensors[name].dims)
            stored += _stored(tensors[name])
    return WeightSizes(total, stored, grids, path.stat().st_size, left)


def _stored(tensor: TensorProto) -> int:
    if tensor.data_type in _HALF_BYTES:
        count: int = math.prod(tensor.dims)
        return -(-count // 2)
    stored: int = numpy_helper.to_array(tensor).nbytes
    return stored
