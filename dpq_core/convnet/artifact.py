"""A quantized classifier on disk: what it takes to run it, and no code of ours that trains.

    model.pt2        torch.export's archive: the graph, codes, scales; quantize and dequantize are
                     torch's own `quantized_decomposed` operations
    manifest.json    format version, scheme, input and classes, bytes of the weights

Codes of 4 and 16 bits lie in bytes and int32: `bytes` counts what is stored, `bits` what is used.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, Node

from dpq_core.convnet.archive import graph_of, open_archive
from dpq_core.digests import write_json
from dpq_core.errors import InputError, one_line

MODEL, MANIFEST = "model.pt2", "manifest.json"
_FORMAT_VERSION = 1
_MOST = 2**16  # images at a time
_WEIGHTED = (
    torch.ops.aten.conv2d.default,
    torch.ops.aten.linear.default,
)
_WEIGHT_ARGUMENT = 1


class ArtifactError(InputError):
    """An artifact that cannot be used, with the file."""


@dataclass(frozen=True)
class WeightSizes:
    """Sizes of the weights of convolutions and linear layers; biases are not among them.

    float_bytes: in fp32. stored_bytes: of codes as they are stored (fp32 where a layer was left
    alone). grid_bytes: of scales and zero points. float_layers: those that were left alone.
    """

    float_bytes: int
    stored_bytes: int
    grid_bytes: int
    float_layers: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return self.float_bytes / self.stored_bytes

    @property
    def ratio_with_grids(self) -> float:
        return self.float_bytes / (self.stored_bytes + self.grid_bytes)


def save_classifier(folder: Path, graph: GraphModule, example: Tensor, about: Any) -> None:
    """Write a converted graph; `about` is kept in the manifest.

    Args:
        example: an input, of at least two images.
    """
    program = export(graph, (example,), dynamic_shapes=({0: Dim("batch", min=1, max=_MOST)},))
    torch.export.save(program, folder / MODEL)
    sizes = weight_sizes(program)
    content = {
        "format_version": _FORMAT_VERSION,
        "input": {"shape": list(example.shape[1:]), "pixels": "uint8 / 127.5 - 1"},
        "weights": asdict(sizes)
        | {"ratio": sizes.ratio, "ratio_with_grids": sizes.ratio_with_grids},
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


def load_classifier(folder: Path) -> GraphModule:
    """The graph that was saved: fp32 in and out, rounding as in integers.

    Raises:
        ArtifactError: no artifact, or its archive cannot be read.
    """
    return graph_of(load_program(folder))


def load_program(folder: Path) -> ExportedProgram:
    """The archive (`dpq_core.convnet.archive`). Raises as `load_classifier`."""
    read_manifest(folder)
    try:
        return open_archive(folder / MODEL)
    except Exception as error:  # of zip, pickle and torch
        reason = one_line(error, 300)
        raise ArtifactError(f"{folder / MODEL}: unreadable: {reason}") from error


def weight_sizes(program: ExportedProgram) -> WeightSizes:
    """What the archive's weights take, read off its tensors."""
    tensors = {**program.state_dict, **program.constants}
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }

    def tensor(node: Any) -> Tensor:
        return cast(Tensor, tensors[names[node.name]])

    total = stored = grids = 0
    left: list[str] = []
    for node in program.graph.nodes:
        if node.target not in _WEIGHTED:
            continue
        weight = node.args[_WEIGHT_ARGUMENT]
        if weight.op == "placeholder":
            left.append(names[weight.name])
            found = tensor(weight)
        else:
            found = tensor(weight.args[0])
            grids += sum(_grid_bytes(argument, tensor) for argument in weight.args[1:3])
        total += 4 * math.prod(found.shape)
        stored += found.numel() * found.element_size()
    return WeightSizes(total, stored, grids, tuple(left))


def _grid_bytes(argument: Any, tensor: Any) -> int:
    """Bytes of one scale or zero point; those of a whole layer are numbers in the graph."""
    if not isinstance(argument, Node):
        return 4
    found = tensor(argument)
    return int(found.numel() * found.element_size())
