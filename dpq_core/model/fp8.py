"""FP8 weights with scales, as DeepSeek, Qwen, Mistral and llm-compressor publish them, in 16 bits.

    weight[i, j] = half( float32(weight8[i, j]) · float32(scale[i // r, j // c]) )

with a scale for r × c values: `weight_block_size` (fp8) or `block_structure` (compressed-tensors)
as `config.json` says, a last block shorter; a row; or the whole matrix. The product is rounded to
FP32 and to 16 bits, scales as they are stored: what transformers makes of `fp8` to the bit
(`Fp8Dequantize` in `integrations/finegrained_fp8.py`, 5.18), and compressed-tensors of its own,
except that in a BF16 model it rounds FP32 scales to BF16 first.

| method in config.json | scale of `X.weight` | of activations, which 16 bits do not need |
|---|---|---|
| fp8 | `X.weight_scale_inv`, older: `X.weight_scale` | `activation_scale`, `input_scale` |
| compressed-tensors | `X.weight_scale` | `input_scale`; of a cache `k_scale`, `v_scale` |
| fbgemm_fp8 | `X.weight_scale` | `input_scale_ub` |

transformers takes r and c from the shape of the scales, and so refuses (or misplaces) the short
last block that DeepSeek's `kv_a_proj_with_mqa` has; DeepSeek's own `weight_dequant` is as above.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dpq_core.errors import CheckpointError
from dpq_core.model.json_files import read_config
from dpq_core.model.layout import Header
from dpq_core.model.quantization import quantization_of, reads_fp8, scale_block

STORED = "F8_E4M3"
_SCALES = ("_scale_inv", "_scale")  # after the name of the weight
_FLOATS = ("F32", "BF16", "F16", "F8_E8M0")
_OF_ACTIVATIONS = (
    "activation_scale",
    "input_scale",
    "input_scale_ub",
    "output_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
)
_PIECE = 1 << 20  # weights that are widened at a time
WORKSPACE = 3 * 4 * _PIECE  # bytes: a piece in FP32, its scales, its product


@dataclass(frozen=True)
class Fp8Weights:
    """scales: weight → its scale. unused: scales of activations. dtype: what weights become. Names
    are the model's."""

    scales: Mapping[str, str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    block: tuple[int, int] | None = None
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, folder: Path, headers: Mapping[str, Header]) -> "Fp8Weights":
        """Empty where `config.json` names no FP8.

        Raises:
            CheckpointError: an FP8 weight without a scale, with two, or with one that does not fit.
        """
        quantization = quantization_of(folder) if (folder / "config.json").is_file() else None
        if quantization is None or not reads_fp8(quantization):
            return cls()
        block = scale_block(quantization)
        weights = {name: h for name, h in headers.items() if h.dtype == STORED}
        scales = {name: _scale_of(folder, name, headers) for name in weights}
        for name, scale in scales.items():
            _check_scale(folder, name, weights[name], scale, headers[scale], block)
        unused = {name for name in headers if name.rpartition(".")[2] in _OF_ACTIVATIONS}
        return cls(scales, frozenset(unused), block, half_of(folder))

    @property
    def hidden(self) -> set[str]:
        """Tensors that are part of others, or of nothing here."""
        return {*self.scales.values(), *self.unused}

    def widened(self, weight: Tensor, scale: Tensor) -> Tensor:
        """[out, in] in `dtype`, by the formula above, in memory of its own: that, and
        `WORKSPACE`."""
        rows, columns = weight.shape
        result = torch.empty(rows, columns, dtype=self.dtype)
        factors, (tall, wide) = self._grid(scale.float(), rows, columns)
        step = max(1, _PIECE // columns)
        for first in range(0, rows, step):
            piece = weight[first : first + step].float()
            row_of = torch.arange(first, first + len(piece)) // tall
            piece *= factors[row_of].repeat_interleave(wide, 1)[:, :columns]
            result[first : first + step] = piece
        return result

    def _grid(self, scale: Tensor, rows: int, columns: int) -> tuple[Tensor, tuple[int, int]]:
        """Scales [blocks down, blocks across], and the size of a block."""
        shape = list(scale.shape)
        if self.block and shape == _blocks(self.block, rows, columns):
            return scale, self.block
        if scale.numel() == 1:
            return scale.reshape(1, 1), (rows, columns)
        return scale.reshape(rows, 1), (1, columns)


def _scale_of(folder: Path, name: str, headers: Mapping[str, Header]) -> str:
    found = [name + ending for ending in _SCALES if name + ending in headers]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder}: tensor {name} is {STORED}, and of {name}_scale_inv and {name}_scale"
            f" {'both are' if found else 'neither is'} there: it has one scale"
        )
    return found[0]


def _check_scale(
    folder: Path,
    name: str,
    weight: Header,
    scale_name: str,
    scale: Header,
    block: tuple[int, int] | None,
) -> None:
    if scale.dtype not in _FLOATS or len(weight.shape) != 2:
        raise CheckpointError(
            f"{folder}: tensor {name} {weight.shape} has {scale_name} of {scale.dtype}: matrices"
            f" with scales of {', '.join(_FLOATS)} are read"
        )
    rows, columns = weight.shape
    fitting = [[], [1], [1, 1], [rows], [rows, 1]]
    fitting += [_blocks(block, rows, columns)] if block else []
    if scale.shape not in fitting:
        asked = f"blocks of {list(block)} ask for {fitting[-1]}" if block else "no blocks are named"
        raise CheckpointError(
            f"{folder}: tensor {scale_name} is {scale.shape} for a weight {weight.shape}: {asked};"
            f" one scale, or {rows}, one a row, would do too"
        )


def _blocks(block: tuple[int, int], rows: int, columns: int) -> list[int]:
    return [-(-rows // block[0]), -(-columns // block[1])]


def half_of(folder: Path) -> torch.dtype:
    """FP16 where `config.json` says so, else BF16."""
    config = read_config(folder)
    text = config.get("text_config")
    for each in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if each.get(key):
                return torch.float16 if each[key] == "float16" else torch.bfloat16
    return torch.bfloat16
