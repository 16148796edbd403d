"""Equivalent models that are easier to quantize: the same function, other weights.

A decoder leaves freedom in its weights that its output does not see, and that four bits do:

    fold      RMSNorm's weight γ into the linears that read it:   W ← W · diag(γ), γ ← 1
    rotate    the residual stream by an orthogonal Q:   embedding ← E Q, readers W ← W Q,
              writers W ← Qᵀ W, head ← L Q; RMSNorm without weight commutes with Q
    rotate    each head's values by an orthogonal P:   v ← Pᵀ v, o ← o P, head by head
    scale     the channels between two linears, or a norm and a linear, by s:   producer's row j
              divided by s_j, readers' column j multiplied by it

Nothing is added at inference. Sources: QuaRot (Ashkboos et al., arXiv 2404.00456) and SpinQuant
(Liu et al., 2405.16406; R1 and R2) for the rotations, SmoothQuant (Xiao et al., 2211.10438) and AWQ
(Lin et al., 2306.00978) for the scaling. All are functions of a checkpoint's tensors in FP32 under
the names of the Llama family. Prototypes: what `four_bits.py` measures, not a part of the pipeline.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dpq_core.model.reader import SIDE_FILES, CheckpointError, CheckpointReader, read_config

Tensors = dict[str, Tensor]

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# Norm → the linears that read it; all within a block.
_NORM_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Heads:
    """How a block's attention is divided."""

    blocks: int
    queries: int
    values: int  # key-value heads
    features: int  # of a head

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Heads":
        """From a `config.json`."""
        queries = int(config["num_attention_heads"])
        features = config.get("head_dim") or int(config["hidden_size"]) // queries
        values = int(config.get("num_key_value_heads") or queries)
        return cls(int(config["num_hidden_layers"]), queries, values, int(features))


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a 16-bit checkpoint in FP32; the head is stored on its own (untied)."""
    reader = CheckpointReader(folder)
    tensors = {name: tensor.float() for name, tensor in reader.tensors(reader.names).items()}
    missing = [name for name in (EMBEDDING, FINAL_NORM) if name not in tensors]
    if missing:
        raise CheckpointError(f"{folder}: tensor {missing[0]} is missing")
    tensors.setdefault(HEAD, tensors[EMBEDDING].clone())
    return tensors


def write_tensors(tensors: Tensors, source: Path, folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint of `tensors` with the side files of `source`, untied."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = read_config(source) | {"tie_word_embeddings": False}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def fold_norms(tensors: Tensors, heads: Heads) -> Tensors:
    """Every RMSNorm's weight moved into the linears that read it."""
    folded = dict(tensors)
    for block in range(heads.blocks):
        for norm, readers in _NORM_READERS.items():
            name = f"model.layers.{block}.{norm}.weight"
            for reader in readers:
                linear = f"model.layers.{block}.{reader}.weight"
                folded[linear] = folded[linear] * tensors[name]
            folded[name] = torch.ones_like(tensors[name])
    folded[HEAD] = folded[HEAD] * tensors[FINAL_NORM]
    folded[FINAL_NORM] = torch.ones_like(tensors[FINAL_NORM])
    return folded


def rotate_stream(tensors: Tensors, heads: Heads, rotation: Tensor) -> Tensors:
    """The residual stream rotated by Q [hidden, hidden] (SpinQuant's R1), norms folded first.

    Raises:
        CheckpointError: a linear that writes to the stream has a bias.
    """
    rotated = fold_norms(tensors, heads)
    rotated[EMBEDDING] = rotated[EMBEDDING] @ rotation
    rotated[HEAD] = rotated[HEAD] @ rotation
    for block in range(heads.blocks):
        prefix = f"model.layers.{block}"
        for reader in (name for readers in _NORM_READERS.values() for name in readers):
            rotated[f"{prefix}.{reader}.weight"] = rotated[f"{prefix}.{reader}.weight"] @ rotation
        for writer in _WRITERS:
            name = f"{prefix}.{writer}"
            if f"{name}.bias" in rotated:
                raise CheckpointError(f"{name} has a bias, which rotations do not handle")
            rotated[f"{name}.weight"] = rotation.T @ rotated[f"{name}.weight"]
    return rotated


def rotate_values(tensors: Tensors, heads: Heads, rotations: Tensor) -> Tensors:
    """Each head's values rotated by P [blocks, value heads, features, features] (R2)."""
    rotated = dict(tensors)
    for block in range(heads.blocks):
        producer = f"model.layers.{block}.self_attn.v_proj"
        reader = f"model.layers.{block}.self_attn.o_proj.weight"
        for suffix in ("weight", "bias"):
            name = f"{producer}.{suffix}"
            if name in tensors:
                rows = tensors[name].unflatten(0, (heads.values, heads.features)).flatten(2)
                if suffix == "bias":
                    rows = rows.unsqueeze(2)
                turned = rotations[block].transpose(1, 2) @ rows
                rotated[name] = turned.reshape(tensors[name].shape)
        columns = tensors[reader].unflatten(1, (heads.queries, heads.features)).transpose(0, 1)
        shared = rotations[block].repeat_interleave(heads.queries // heads.values, 0)
        rotated[reader] = (columns @ shared).transpose(0, 1).flatten(1)
    return rotated


def scale_channels(tensors: Tensors, heads: Heads, factors: Mapping[str, Tensor]) -> Tensors:
    """Channels scaled by s, by the path of the linear that reads them.

    Args:
        factors: path of the first linear of a shared input → s [features], positive. For `o_proj`
            one factor a value channel [value heads · features], which its query heads share.
    """
    scaled = dict(tensors)
    for path, factor in factors.items():
        *parents, module, linear = path.split(".")
        prefix, member = ".".join(parents), f"{module}.{linear}"
        readers: tuple[str, ...] = (member,)
        columns = factor
        if member == "self_attn.o_proj":
            producer = "self_attn.v_proj"
            columns = spread_values(factor, heads)
        elif member == "mlp.down_proj":
            producer = "mlp.up_proj"
        else:
            producer, readers = next(
                (norm, group) for norm, group in _NORM_READERS.items() if group[0] == member
            )
        for suffix in ("weight", "bias"):
            name = f"{prefix}.{producer}.{suffix}"
            if name in scaled:
                by = factor.unsqueeze(1) if scaled[name].ndim == 2 else factor
                scaled[name] = scaled[name] / by
        for reader in readers:
            name = f"{prefix}.{reader}.weight"
            scaled[name] = scaled[name] * columns
    return scaled


def spread_values(factor: Tensor, heads: Heads) -> Tensor:
    """[value heads · features] → [query heads · features], as attention reads value heads."""
    grouped = factor.view(heads.values, heads.features)
    return grouped.repeat_interleave(heads.queries // heads.values, 0).flatten()


def random_rotation(features: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [features, features] fp32.

    Hadamard with random signs for the largest power of two in `features`, Kronecker a random
    orthogonal matrix (QR of a Gaussian) for what is left.
    """
    power = features & -features
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64))
    hadamard /= power**0.5
    rest = features // power
    gaussian = torch.randn(rest, rest, generator=generator, dtype=torch.float64)
    orthogonal = torch.linalg.qr(gaussian).Q.contiguous()
    signs = torch.randint(0, 2, (features,), generator=generator, dtype=torch.float64) * 2 - 1
    return (signs[:, None] * torch.kron(orthogonal, hadamard)).float()
