"""An archive of torch.export, read as data: whatever it holds, reading and running it computes on
tensors and does nothing else.

torch.export.load unpickles where an archive says so, loads compiled libraries that lie in one,
evaluates the expressions of its sizes (SymPy), and calls whatever function of torch a node names.
So an archive is looked through first, by the reader that then reads it, and refused unless

- its records are those of one program: plain weights and constants, no compiled code;
- its example inputs are tensors (`weights_only`);
- its nodes are ATen's operations or those of quantization, or arithmetic on sizes;
- its sizes are sums and products of symbols.

Guards, which are Python's code too, are not built.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import _package as pt2
from torch.fx import GraphModule

_PROGRAM, _INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_RECORDS = re.compile(
    r"archive_(format|version)|byteorder|\.data/(version|serialization_id)"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+"
)
_OPERATION = re.compile(
    r"torch\.ops\.(aten(?!\.(save|from_file)\b)|quantized_decomposed|prims)\.\w+(\.\w+)?"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|getitem|eq|ne|lt|le|gt|ge)",
    re.ASCII,
)
_SIZE = re.compile(  # Symbol('s31', positive=True, integer=True); 2*s0 + 1; Add(Integer(1), …)
    r"('\w+'|\b(Symbol|Integer|Rational|Add|Mul|Pow|Max|Min|Mod|FloorDiv|CeilDiv|CleanDiv)\("
    r"|\b(positive|nonnegative|integer|True|False)\b|\b[su]\d+\b|\b\d+\b|[-+*/=(), ])*",
    re.ASCII,
)
_TREE = re.compile(r"builtins\.(tuple|list|dict)")


class ArchiveError(ValueError):
    """What is in an archive that is not read, or missing."""


def open_archive(path: Path) -> ExportedProgram:
    """The program that torch.export.save wrote.

    Raises:
        ArchiveError: it holds what is more than data. Others, of torch: it is damaged.
    """
    content = path.read_bytes()  # once: what is checked is what is read
    _check(pt2.PT2ArchiveReader(io.BytesIO(content)))
    # Not torch.export.load, which goes on with an older form, pickled, where this one fails.
    return pt2.load_pt2(io.BytesIO(content)).exported_programs["model"]


def graph_of(program: ExportedProgram) -> GraphModule:
    """To be run."""
    return program.module(check_guards=False)


def _check(reader: pt2.PT2ArchiveReader) -> None:
    names = set(reader.get_file_names())
    for name in sorted(names):
        if name not in (_PROGRAM, _INPUTS, *_CONFIGS) and not _RECORDS.fullmatch(name):
            raise ArchiveError(f"{name} is no part of a saved program's data, and is not read")
    for name in (_PROGRAM, _INPUTS, *_CONFIGS):
        if name not in names:
            raise ArchiveError(f"{name} is missing: save it anew, by torch.export.save")
    for name in _CONFIGS:
        for tensor, about in json.loads(reader.read_string(name))["config"].items():
            where = f"{name.rpartition('/')[0]}/{about['path_name']}"
            if about["use_pickle"] or not _RECORDS.fullmatch(where):
                raise ArchiveError(f"{tensor} is pickled, and is not read: save plain tensors")
    torch.load(io.BytesIO(reader.read_bytes(_INPUTS)), weights_only=True)  # raises
    for key, text in _texts(json.loads(reader.read_string(_PROGRAM))):
        allowed = _ALLOWED.get(key)
        if allowed and not allowed.fullmatch(text):
            raise ArchiveError(f"{key} {text[:80]!r} is no operation on tensors or sizes")


_ALLOWED = {"target": _OPERATION, "as_operator": _OPERATION, "expr_str": _SIZE, "tree": _TREE}


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a program, with its key; structures of arguments are JSON in JSON."""
    if isinstance(node, dict):
        for name, each in node.items():
            yield from _texts(each, name)
    elif isinstance(node, list):
        for each in node:
            yield from _texts(each, key)
    elif isinstance(node, str):
        if key in ("in_spec", "out_spec"):
            yield from (("tree", name) for name in _types(json.loads(node)))
        else:
            yield key, node


def _types(node: Any) -> Iterator[str]:
    """The types in a structure of arguments."""
    if isinstance(node, dict):
        if node.get("type") is not None:
            yield str(node["type"])
        yield from _types(node.get("children_spec"))
    elif isinstance(node, list):
        for each in node:
            yield from _types(each)
