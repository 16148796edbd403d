"""A checkpoint on disk as a model: streamed block by block, or without weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from dpq_core.layer.kv_cache import KEY_SCALE, VALUE_SCALE
from dpq_core.model.anatomy import parts_of
from dpq_core.model.blocks import BlockStream
from dpq_core.model.empty import empty_of, sixteen_bits
from dpq_core.model.given import reader_of
from dpq_core.model.kv_cache import attention_of, round_cache
from dpq_core.model.quantization import keeps_fp8_cache
from dpq_core.model.reader import (
    CheckpointError,
    CheckpointReader,
    model_type_of,
    read_config,
    stored_type,
)


class StreamedModel(BlockStream):
    """A causal LM whose weights stay on disk.

    Args:
        images: as above.
        trust_remote_code: run the checkpoint's own model code.
        dtype: as `empty_model` has it.

    Raises:
        CheckpointError: unreadable checkpoint, or as above.
        ArchitectureError: see `dpq_core.model`.
    """

    reader: CheckpointReader

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        images: bool = False,
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        reader = reader_of(folder)
        super().__init__(empty_model(folder, trust_remote_code, dtype), reader, device, images)


def empty_model(
    folder: Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> Any:
    """The transformers model of a checkpoint's configuration, parameters without memory, experts
    one by one. That of a native checkpoint with an FP8 cache rounds keys and values by the
    checkpoint's scales.

    dtype: that it is run in; None: sixteen-bit checkpoints keep their type, anything wider is run
    in BF16.

    Raises:
        CheckpointError: a configuration that transformers does not know, or only with the
            checkpoint's own code.
    """
    fp8_cache, config = keeps_fp8_cache(folder), load_config(folder, trust_remote_code)
    for each in (config, config.get_text_config()):
        if hasattr(each, "quantization_config"):
            del each.quantization_config  # transformers and lm-eval would look it up
    if dtype is not None:
        config.dtype = dtype
    model = empty_of(config, trust_remote_code, dtype or stored_type(folder))
    if fp8_cache:
        _round_cache(model, CheckpointReader(folder))
    return model


def _round_cache(model: Any, reader: CheckpointReader) -> None:
    path = parts_of(model).blocks
    for number, block in model.get_submodule(path).named_children():
        attention = attention_of(block)
        names = [f"{path}.{number}.{attention}.{scale}" for scale in (KEY_SCALE, VALUE_SCALE)]
        scales = reader.tensors(names)
        round_cache(block.get_submodule(str(attention)), *(scales[name] for name in names))


def sixteen_bit_type(config: Any, folder: Path) -> torch.dtype:
    """The type that a checkpoint's model runs in."""
    return sixteen_bits(config, stored_type(folder))


def as_run(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it is read, for a model that runs in `dtype`: wider ones of FP16 models are
    narrowed, since these are the numbers that the model multiplies with."""
    return weight.to(dtype) if dtype == torch.float16 else weight


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of a checkpoint.

    Raises:
        CheckpointError: as `empty_model`.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        if "auto_map" in read_config(folder) and not trust_remote_code:
            raise CheckpointError(
                f"{folder}: model_type {model_type_of(folder)!r} is code of the checkpoint's own, "
                "which is not run: read it, and set model.trust_remote_code: true to run it"
            ) from error
        raise CheckpointError(
            f"{folder / 'config.json'}: {next(iter(str(error).strip().splitlines()), error)}"
        ) from error
