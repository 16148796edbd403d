"""What a format of other people's loaders has to say for itself: a row of the table of exports."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpq_core.checkpoint.native import QuantizedCheckpoint
from dpq_core.errors import InputError
from dpq_core.layer.records import QuantizedLinear
from dpq_core.model.plan import Outside as Part
from dpq_core.model.reader import read_config
from dpq_core.recipe.scheme import Scheme

Quantization = dict[str, Any]  # `quantization_config` of an export's config.json


class ExportError(InputError):
    """An export that a format cannot express, with the layer, its scheme, and the way out."""


@dataclass(frozen=True)
class Target:
    """A linear layer [rows, features] to be written into a model of 16-bit type `dtype`.

    base: the scheme of the checkpoint, from which the layer's own may differ. outside: what it is
    outside of the blocks.
    """

    name: str
    rows: int
    features: int
    scheme: Scheme
    base: Scheme
    dtype: torch.dtype
    outside: Part = ""

    @property
    def groups(self) -> int:
        return self.features // self.scheme.group_size

    @property
    def stored_dtype(self) -> str:
        """The model's type as safetensors calls it."""
        return {torch.bfloat16: "BF16", torch.float16: "F16"}[self.dtype]


@dataclass(frozen=True)
class Arithmetic:
    """How a reader computes with an export, and how far from the evaluated model that may lead.

    reference: a module that computes like the reader, from the native layer and its bias: the
        reader's logits must be equal to this module's, bit for bit.
    tolerance: of the reader's logits against the evaluated model's: norm of the difference over
        the norm. 0: equal, bit for bit. reason: where a difference comes from.
    """

    reference: Callable[[QuantizedLinear, Tensor | None], nn.Module]
    tolerance: float
    reason: str


@dataclass(frozen=True)
class Format:
    """One way to write a quantized model.

    obstacle: why a layer cannot be written, and the way out; or None.
    config: `quantization_config`; looks at the checkpoint's layers as far as it must.
    tensors: what is stored for a quantized layer, by the name that follows the layer's.
    shapes: shape and safetensors type of each of these tensors.
    bits: of a weight, by the format's own arithmetic.
    load: folder of an export, the native checkpoint → a causal LM as a reader makes it.
    reader: who that is.
    without_cache: why it has no place for the scales of an FP8 cache; None: it has.

    Layers whose method is `none` are written as weights of the model's type, whatever the format.
    """

    obstacle: Callable[[Target], str | None]
    config: Callable[[QuantizedCheckpoint], Quantization]
    tensors: Callable[[QuantizedLinear, Target, Quantization], dict[str, Tensor]]
    shapes: Callable[[Target], dict[str, tuple[list[int], str]]]
    bits: Callable[[Target], float]
    load: Callable[[Path, QuantizedCheckpoint], Any]
    reader: str
    arithmetic: Arithmetic
    without_cache: str | None = None


def left_out(checkpoint: QuantizedCheckpoint) -> list[str]:
    """Linears that stay in 16 bits: those that the plan skipped, and those whose method is none."""
    kept = [name for name, scheme in checkpoint.schemes.items() if scheme.method == "none"]
    return [*checkpoint.manifest["skipped"], *kept]


def targets_of(checkpoint: QuantizedCheckpoint) -> list[Target]:
    """The layers of a native checkpoint."""
    dtype = getattr(torch, read_config(checkpoint.folder)["dtype"])
    return [
        Target(
            name,
            rows,
            features,
            checkpoint.schemes[name],
            checkpoint.scheme,
            dtype,
            checkpoint.outside[name],
        )
        for name, (rows, features) in checkpoint.shapes.items()
    ]


def embedding_obstacle(target: Target) -> str | None:
    """Why a format whose readers quantize linears alone cannot hold an embedding; or None."""
    if target.scheme.method == "none" or target.outside not in ("embedding", "both"):
        return None
    tied = " (and multiply with what is tied to it)" if target.outside == "both" else ""
    return (
        f"its readers look rows up{tied} in 16 bits: leave it out of layers, or use the native"
        " checkpoint"
    )
