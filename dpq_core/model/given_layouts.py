"""How checkpoints of others store 4-bit codes, scales and zero points: a layout is a row.

    weight[n, k] = scale[n, g] · (code[n, k] − zero[n, g])        g = g_idx[k], or k // group_size

| layout | codes, int32 | zero points, int32 | scales |
|---|---|---|---|
| GPTQ | `qweight` [K/8, N], along K | `qzeros` [G, N/8], along N | `scales` [G, N] |
| AWQ, `gemm` | `qweight` [K, N/8], along N | `qzeros` [G, N/8], along N | `scales` [G, N] |
| compressed-tensors | `weight_packed` [N, K/8] | `weight_zero_point` [N/8, G] | `weight_scale` |

Lowest nibble first, and in AWQ the eight columns of a word in the order 0, 2, 4, 6, 1, 3, 5, 7.
GPTQ's zero points are stored minus one (0 as 15) but in version 2; symmetric compressed-tensors
store none, which means 8. `g_idx` (`weight_g_idx`) is there where columns were ordered.

Sources: the GPTQ reference code and AutoGPTQ's `qlinear`; AutoAWQ's `pack_intweight`;
compressed-tensors 0.19, `pack_to_int32`. AutoRound writes the first two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpq_core.arithmetic.packing import unpack_codes
from dpq_core.errors import CheckpointError

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that each of eight columns is in
_SYMMETRIC = 8
READ = (
    "GPTQ and AWQ (gemm) of 4 bits and pack-quantized compressed-tensors of INT4 with 16-bit inputs"
)

Parts = Mapping[str, Tensor]  # a layer's tensors by the name that follows the layer's


@dataclass(frozen=True)
class Layout:
    """codes: packed, rows (which begin at a multiple of eight) → [rows, K] uint8. zero_points:
    stored, N → [N, G]. scales: stored → [N, G]. sides: shape of the packed codes → N, K. shapes: N,
    K, G → shape of each part. packed, scaled, zeroed, ordered: names of parts. optional: those that
    need not be there."""

    codes: Callable[[Tensor, slice], Tensor]
    zero_points: Callable[[Tensor, int], Tensor]
    scales: Callable[[Tensor], Tensor]
    sides: Callable[[list[int]], tuple[int, int]]
    shapes: Callable[[int, int, int], dict[str, list[int]]]
    packed: str
    scaled: str
    zeroed: str
    ordered: str
    optional: frozenset[str]


def _eighths(rows: slice) -> slice:
    return slice(rows.start // 8, -(-rows.stop // 8))


def _in_order(nibbles: Tensor) -> Tensor:
    """AWQ's columns [rows, n] as they follow one another."""
    places = torch.tensor(_AWQ_PLACES)
    ordered: Tensor = nibbles.unflatten(1, (-1, 8)).index_select(2, places).flatten(1)
    return ordered


def _nibbles(words: Tensor) -> Tensor:
    return unpack_codes(words, 8 * words.shape[1])


GPTQ = Layout(
    codes=lambda packed, rows: _nibbles(packed[:, rows].T),
    zero_points=lambda zeros, _: _nibbles(zeros).T,
    scales=lambda scales: scales.T,
    sides=lambda shape: (shape[1], 8 * shape[0]),
    shapes=lambda rows, columns, groups: {
        "qweight": [columns // 8, rows],
        "qzeros": [groups, -(-rows // 8)],
        "scales": [groups, rows],
        "g_idx": [columns],
    },
    packed="qweight",
    scaled="scales",
    zeroed="qzeros",
    ordered="g_idx",
    optional=frozenset({"g_idx"}),
)
AWQ = Layout(
    codes=lambda packed, rows: _in_order(_nibbles(packed[:, _eighths(rows)])).T,
    zero_points=lambda zeros, _: _in_order(_nibbles(zeros)).T,
    scales=lambda scales: scales.T,
    sides=lambda shape: (8 * shape[1], shape[0]),
    shapes=lambda rows, columns, groups: {
        "qweight": [columns, rows // 8],
        "qzeros": [groups, rows // 8],
        "scales": [groups, rows],
    },
    packed="qweight",
    scaled="scales",
    zeroed="qzeros",
    ordered="g_idx",
    optional=frozenset(),
)
COMPRESSED = Layout(
    codes=lambda packed, rows: _nibbles(packed[rows]),
    zero_points=lambda zeros, rows: _nibbles(zeros.T).T[:rows],
    scales=lambda scales: scales,
    sides=lambda shape: (shape[0], 8 * shape[1]),
    shapes=lambda rows, columns, groups: {
        "weight_packed": [rows, columns // 8],
        "weight_zero_point": [-(-rows // 8), groups],
        "weight_scale": [rows, groups],
        "weight_g_idx": [columns],
        "weight_shape": [2],
    },
    packed="weight_packed",
    scaled="weight_scale",
    zeroed="weight_zero_point",
    ordered="weight_g_idx",
    optional=frozenset({"weight_zero_point", "weight_g_idx", "weight_shape"}),
)


@dataclass(frozen=True)
class GivenCodes:
    """What `quantization_config` says. group_size: -1 is all columns. offset: what zero points were
    stored without."""

    layout: Layout
    group_size: int
    offset: int = 0

    def zero_points(self, parts: Parts) -> Tensor:
        """[N, G] uint8."""
        scales = self.layout.scales(parts[self.layout.scaled])
        if self.layout.zeroed not in parts:
            return torch.full_like(scales, _SYMMETRIC, dtype=torch.uint8)
        stored = self.layout.zero_points(parts[self.layout.zeroed], len(scales))
        return (stored + self.offset) % 16


def reads_codes(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint's 4-bit codes are read."""
    try:
        return quantization is not None and given_codes(quantization) is not None
    except CheckpointError:
        return False


def read_by_codes(quantization: Mapping[str, Any] | None, source: bool = False) -> bool:
    """Whether a checkpoint is read as the 16 bits that its codes mean: as what a release is made of
    and judged against, and where there is no other reader of its format."""
    if quantization is None or not reads_codes(quantization):
        return False
    return source or quantization["quant_method"] not in ("gptq", "compressed-tensors")


def given_codes(quantization: Mapping[str, Any]) -> GivenCodes:
    """How a checkpoint stores its codes.

    Raises:
        CheckpointError: in a way that is not read, with the setting that says so.
    """
    method = quantization["quant_method"]
    if method == "compressed-tensors":
        return _of_groups(quantization)
    packing = str(quantization.get("packing_format", "auto_round:auto_gptq"))
    if method == "auto-round":
        method = packing.rpartition("auto_")[2]
    if method not in ("gptq", "awq"):
        raise _unread("quant_method", quantization["quant_method"])
    bits = quantization.get("bits", quantization.get("w_bit"))
    group_size = quantization.get("group_size", quantization.get("q_group_size", -1))
    if bits != 4:
        raise _unread("bits", bits)
    _check_group(group_size)
    if method == "awq":
        if str(quantization.get("version", "gemm")).lower() != "gemm":
            raise _unread("version", quantization["version"])
        return GivenCodes(AWQ, group_size)
    version = quantization.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise _unread("checkpoint_format", version)
    return GivenCodes(GPTQ, group_size, offset=1 if version == "gptq" else 0)


def _of_groups(quantization: Mapping[str, Any]) -> GivenCodes:
    """Of compressed-tensors: all layers alike, and nothing is done to them but scaling."""
    sparsity = quantization.get("sparsity_config") or {}
    for setting in ("transform_config", "kv_cache_scheme"):
        if quantization.get(setting):
            raise _unread(setting, "set")
    if sparsity.get("format", "dense") != "dense":
        raise _unread("sparsity_config", sparsity["format"])
    groups = quantization.get("config_groups")
    sizes = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        if (weights.get("type"), weights.get("num_bits")) != ("int", 4):
            raise _unread("weights", f"{weights.get('type')}, {weights.get('num_bits')} bits")
        if group.get("input_activations"):
            raise _unread("input_activations", "set")
        if weights.get("strategy") not in ("group", "channel"):
            raise _unread("strategy", weights.get("strategy"))
        form = group.get("format") or quantization.get("format")
        if form != "pack-quantized":
            raise _unread("format", form)
        sizes.add(weights.get("group_size") or -1)
    if len(sizes) != 1:
        raise _unread("group_size", sorted(sizes, key=str))
    (group_size,) = sizes
    _check_group(group_size)
    return GivenCodes(COMPRESSED, group_size)


def _check_group(group_size: Any) -> None:
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise _unread("group_size", group_size)


def _unread(setting: str, value: object) -> CheckpointError:
    return CheckpointError(f"{setting} is {value!r}, and of codes {READ} are read")
