"""A 4-bit checkpoint of others read as the 16-bit model that it computes with, and its codes.

To all that reads models a linear `X` stored as codes has the tensor `X.weight`, of the model's
16-bit type: scale · (code − zero), a product in FP32 that is rounded once, as W4A16 is run. Beside
it `codes` gives what is stored. Tensors of the layout have no names here, and neither have
biases of zeros, which AutoGPTQ adds to every layer.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from dpq_core.errors import CheckpointError
from dpq_core.layer.given import GivenWeight
from dpq_core.model.fp8 import half_of
from dpq_core.model.given_layouts import GivenCodes, Parts, given_codes, reads_codes
from dpq_core.model.quantization import quantization_of
from dpq_core.model.reader import CheckpointReader
from dpq_core.recipe.scheme import Scheme

_PIECE = 1 << 18  # codes that are unpacked at a time
_FLOATS = ("F16", "BF16", "F32")


def reader_of(folder: Path) -> CheckpointReader:
    """The reader of a model that is quantized, or judged against: 4-bit codes are read too.

    Raises:
        CheckpointError: as `CheckpointReader` and `GivenReader`.
    """
    quantization = quantization_of(folder) if (folder / "config.json").is_file() else None
    if quantization is not None and reads_codes(quantization):
        return GivenReader(folder, given_codes(quantization))
    return CheckpointReader(folder)


class GivenReader(CheckpointReader):
    """Args:
        given: how the codes are stored.

    Raises:
        CheckpointError: a layer without all that belongs to its codes, or of shapes or types that
            do not belong together.
    """

    def __init__(self, folder: Path, given: GivenCodes) -> None:
        super().__init__(folder)
        self._given, self._dtype = given, half_of(folder)
        packed = f".{given.layout.packed}"
        linears = [n.removesuffix(packed) for n in self._headers if n.endswith(packed)]
        if not linears:
            raise CheckpointError(f"{folder}: config.json names codes, and no tensor is X{packed}")
        self._parts = {f"{linear}.weight": self._parts_of(linear) for linear in linears}
        parts = {name for each in self._parts.values() for name in each.values()}
        biases = {f"{linear}.bias" for linear in linears} & self._headers.keys()
        zeros = {name for name, x in self._as_stored(biases) if not x.any()}
        names = self._headers.keys() - parts - zeros - self._fp8.hidden
        self._names = sorted(names | self._parts.keys())
        self._known = frozenset(self._names)

    @property
    def widens(self) -> bool:
        return True

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        stored = super().tensors(name for name in wanted if name not in self._parts)
        return {n: self._weight(n) if n in self._parts else stored[n] for n in wanted}

    def read_ahead(self, names: Iterable[str]) -> None:
        super().read_ahead(
            part for name in names for part in self._parts.get(name, {"": name}).values()
        )

    def shape_and_type(self, name: str) -> tuple[list[int], str]:
        if name not in self._parts:
            return super().shape_and_type(name)
        return self._sides(name), "F16" if self._dtype == torch.float16 else "BF16"

    def has_codes(self, linear: str) -> bool:
        """Whether a linear layer is stored as codes."""
        return f"{linear}.weight" in self._parts

    def codes(self, linear: str, group_size: int) -> GivenWeight:
        """A linear layer as it is stored, in groups of `group_size`, which `obstacle` lets pass."""
        parts, layout = self._read(f"{linear}.weight"), self._given.layout
        rows, columns = self._sides(f"{linear}.weight")
        scales, zeros = layout.scales(parts[layout.scaled]), self._given.zero_points(parts)
        group = self._group_of(f"{linear}.weight", parts)[::group_size]
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        for piece in _pieces(rows, columns):
            codes[piece] = layout.codes(parts[layout.packed], piece)[: piece.stop - piece.start]
        return GivenWeight(
            codes=codes,
            scale=scales.float()[:, group].contiguous(),
            zero_point=zeros[:, group].contiguous(),
            group_size=group_size,
            dtype=self._dtype,
        )

    def obstacle(self, linear: str, scheme: Scheme) -> str | None:
        """Why the codes of a linear layer are none of a grid of `scheme`, with the way out; or
        None."""
        name, layout, size = f"{linear}.weight", self._given.layout, scheme.group_size
        parts = self._read(name, without=layout.packed)
        group = self._group_of(name, parts)
        if not torch.equal(group, group[torch.arange(len(group)) // size * size]):
            if bool((group.diff() < 0).any()):
                return "columns of a group are not side by side (desc_act)"
            given = self._given.group_size
            return f"groups of {given} columns are given, and scheme.group_size is {size}"
        if scheme.symmetric and bool((self._given.zero_points(parts) != 8).any()):
            return "zero points other than 8, and scheme.symmetric is true"
        scales = parts[layout.scaled]
        if scheme.group_scale == "e4m3" and bool((scales < 0).any()):
            return "a negative scale, which scheme.group_scale e4m3 has none of"
        return None

    def _parts_of(self, linear: str) -> dict[str, str]:
        """Part → tensor of a layer."""
        layout = self._given.layout
        rows, columns = layout.sides(self._headers[f"{linear}.{layout.packed}"].shape)
        size = self._given.group_size if self._given.group_size > 0 else columns
        found = {}
        for part, shape in layout.shapes(rows, columns, -(-columns // size)).items():
            name = f"{linear}.{part}"
            if name in self._headers:
                found[part] = name
                self._check(name, shape, of_floats=part == layout.scaled)
            elif part not in layout.optional:
                raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return found

    def _check(self, name: str, shape: list[int], of_floats: bool) -> None:
        header = self._headers[name]
        if header.shape != shape:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is {header.shape}, but 4 bits in groups of"
                f" {self._given.group_size} ask for {shape}"
            )
        if of_floats != (header.dtype in _FLOATS):
            kind = "floats" if of_floats else "integers"
            raise CheckpointError(
                f"{self.folder}: tensor {name} is {header.dtype}, expected {kind}"
            )

    def _sides(self, name: str) -> list[int]:
        layout = self._given.layout
        return list(layout.sides(self._headers[self._parts[name][layout.packed]].shape))

    def _read(self, name: str, without: str = "") -> Parts:
        parts = {stored: p for p, stored in self._parts[name].items() if p != without}
        return {parts[stored]: tensor.clone() for stored, tensor in self._as_stored(parts)}

    def _group_of(self, name: str, parts: Parts) -> Tensor:
        """The group of each column [K] int64.

        Raises:
            CheckpointError: one that is not there.
        """
        layout, columns = self._given.layout, self._sides(name)[1]
        if layout.ordered not in parts:
            size = self._given.group_size if self._given.group_size > 0 else columns
            return torch.arange(columns) // size
        group, groups = parts[layout.ordered].long(), layout.scales(parts[layout.scaled]).shape[1]
        if group.min() < 0 or group.max() >= groups:
            stored = self._parts[name][layout.ordered]
            raise CheckpointError(f"{self.folder}: {stored} points outside of {groups} groups")
        return group

    def _weight(self, name: str) -> Tensor:
        """[N, K] in the model's type."""
        parts, layout = self._read(name), self._given.layout
        rows, columns = self._sides(name)
        scales, zeros = layout.scales(parts[layout.scaled]).float(), self._given.zero_points(parts)
        group = self._group_of(name, parts)
        weight = torch.empty(rows, columns, dtype=self._dtype)
        for piece in _pieces(rows, columns):
            steps = layout.codes(parts[layout.packed], piece)[: piece.stop - piece.start].float()
            steps -= zeros[piece][:, group].float()
            weight[piece] = steps.mul_(scales[piece][:, group])
        return weight


def _pieces(rows: int, columns: int) -> Iterable[slice]:
    """Slices of rows that begin at multiples of eight."""
    step = max(1, _PIECE // columns // 8) * 8
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
