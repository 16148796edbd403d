"""Tensors in safetensors files of a folder: the large ones in rows, a file each, so that cores can
hash an artifact side by side.

    tensors.safetensors         all small ones
    part-000.safetensors …      rows of the others, in order: key → [some rows, …]
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_SMALL, _PART = "tensors.safetensors", 256 << 20  # bytes


def saver(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    """A function that fills a folder with them."""

    def save(folder: Path) -> None:
        small = {name: tensor for name, tensor in tensors.items() if tensor.nbytes <= _PART}
        save_file(small, folder / _SMALL)
        for number, (name, rows) in enumerate(_parts(tensors)):
            save_file({name: rows}, folder / f"part-{number:03}.safetensors")

    return save


def load(folder: Path) -> dict[str, Tensor]:
    """Inverse of `saver`."""
    found: dict[str, Tensor] = load_file(folder / _SMALL)
    parts: dict[str, list[Tensor]] = {}
    for path in sorted(folder.glob("part-*.safetensors")):
        for name, rows in load_file(path).items():
            parts.setdefault(name, []).append(rows)
    return found | {name: torch.cat(rows) for name, rows in parts.items()}


def load_small(folder: Path, names: Iterable[str]) -> list[Tensor]:
    """Some of the small ones, by name; nothing else is read."""
    with safe_open(folder / _SMALL, "pt") as file:
        return [file.get_tensor(name) for name in names]


def _parts(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if tensor.nbytes > _PART:
            rows = max(1, _PART * len(tensor) // tensor.nbytes)
            for start in range(0, len(tensor), rows):
                yield name, tensor[start : start + rows].contiguous()
