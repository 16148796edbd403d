"""Of a checkpoint's bytes, those of the embedding, the head, attention, MLPs, and the rest.

By the names of the tensors: a part of a block that has a matrix is attention where it is called so,
and else an MLP; a part without one is a norm. In small models embedding and head are most of it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from dpq_core.checkpoint.native import QuantizedCheckpoint
from dpq_core.model.anatomy import Parts, parts_of
from dpq_core.model.reader import CheckpointReader

TIED = "embedding and head, tied"
PARTS = (TIED, "embedding", "head", "attention", "MLP", "norms and the rest")

Stored = Mapping[str, tuple[list[int], int]]  # tensor → shape, bytes


def bytes_by_part(
    checkpoint: QuantizedCheckpoint, export: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Of a native checkpoint, or of its export with this manifest; parts that there are."""
    parts = parts_of(checkpoint.empty_model())
    if export is None:
        return by_part(_of_files(checkpoint.reader), parts)
    stored = {
        name: (about["shape"], math.prod(about["shape"]) * getattr(torch, about["dtype"]).itemsize)
        for name, about in export["tensors"].items()
    }
    return by_part(stored, parts)


def by_part(stored: Stored, parts: Parts) -> dict[str, int]:
    """Bytes of each part, in the order of `PARTS`."""
    matrices = {_member(name, parts) for name, (shape, _) in stored.items() if len(shape) > 1}
    weights = ("weight", "weight_packed", "qweight")
    tied = not any(f"{parts.head}.{name}" in stored for name in weights)
    found = dict.fromkeys(PARTS, 0)
    for name, (_, size) in stored.items():
        if name.startswith(f"{parts.embedding}."):
            found[TIED if tied else "embedding"] += size
        elif name.startswith(f"{parts.head}."):
            found["head"] += size
        elif (member := _member(name, parts)) and member in matrices:
            attends = "attn" in member or "attention" in member
            found["attention" if attends else "MLP"] += size
        else:
            found["norms and the rest"] += size
    return {part: size for part, size in found.items() if size}


def _member(name: str, parts: Parts) -> str:
    """What a tensor of a block belongs to in its block (`self_attn`); empty outside of them."""
    if not name.startswith(f"{parts.blocks}."):
        return ""
    return name.removeprefix(f"{parts.blocks}.").split(".")[1]


def _of_files(reader: CheckpointReader) -> Stored:
    found = {}
    for name in reader.names:
        shape, kind = reader.shape_and_type(name)
        bits = re.search(r"\d+", kind)  # BF16, F8_E4M3, I32; BOOL has none
        found[name] = shape, math.prod(shape) * (int(bits[0]) if bits else 8) // 8
    return found
