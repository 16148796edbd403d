"""The inspection of a 16-bit model: whether a checkpoint is what it seems to be, from its headers.

Every command that reads a model calls `check_source` before any work; the reader itself refuses
layouts that stand for no model (`dpq_core.model.layout`). What passes has, for each parameter of
the model that `config.json` describes, one tensor of its shape and of a type that is read, and no
tensor that nobody takes: transformers leaves such tensors out with a warning, and what they are
(scales of any scheme, a second head, half an adapter) decides whether the others mean anything.
"""

import re
from pathlib import Path
from typing import Any

import torch

from dpq_core.errors import CheckpointError, listed
from dpq_core.model.given import reader_of
from dpq_core.model.given_layouts import READ, given_codes, reads_codes
from dpq_core.model.quantization import described, quantization_of, reads_fp8
from dpq_core.model.reader import CheckpointReader
from dpq_core.model.streaming import empty_model

TYPES = ("BF16", "F16", "F32")
# What transformers leaves out without a word, besides each model's own list: buffers that it made
# persistent once (`_adjust_missing_and_unexpected_keys` of 5.18).
_LEFT_OUT = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
_SHOWN = 3


def check_source(folder: Path, trust_remote_code: bool = False, keeps: bool = False) -> None:
    """Refuse what cannot be read as a 16-bit model.

    Args:
        keeps: the codes of a 4-bit checkpoint are to be kept: it is one, and read as the 16-bit
            model that it computes with.

    Raises:
        CheckpointError: a method of quantization that is not read, a tensor that is missing, of
            another shape or type, or that nobody takes; unreadable files.
    """
    quantization = quantization_of(folder)
    if keeps:
        _check_codes(folder, quantization)
    elif quantization is not None and not reads_fp8(quantization):
        kept = "; scheme.method: keep takes its codes as they are" * reads_codes(quantization)
        raise CheckpointError(
            f"{folder}: quantized already: quant_method {described(quantization)}: 16 bits and FP8"
            " with scales can be quantized again: give the model that it was made of (a 16-bit"
            " model whose config.json names a method by mistake: delete quantization_config there)"
            f"{kept}"
        )
    check_parameters(empty_model(folder, trust_remote_code), reader_of(folder))


def _check_codes(folder: Path, quantization: dict[str, Any] | None) -> None:
    try:
        if quantization is None:
            raise CheckpointError(f"it has no quantization_config: {READ} are read")
        given_codes(quantization)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: scheme.method is keep, and no codes to keep are found: {error}: choose"
            " another method for a model of 16 bits"
        ) from error


def check_values(folder: Path, trust_remote_code: bool = False) -> None:
    """Read every tensor once: all values are finite, and in the type that the model runs in.

    Raises:
        CheckpointError: naming the first tensor of which one is not.
    """
    reader = reader_of(folder)
    reader.check_finite()
    if empty_model(folder, trust_remote_code).dtype != torch.float16:
        return  # BF16 has the range of FP32
    largest = torch.finfo(torch.float16).max
    for name in reader.names:
        kind = reader.shape_and_type(name)[1]
        if kind in TYPES and kind != "F16" and reader.tensor(name).abs().max() > largest:
            raise CheckpointError(
                f"{folder}: tensor {name} of {kind} has values beyond {largest:g}, and config.json"
                ' says float16: write "dtype": "bfloat16" there'
            )


def check_parameters(model: Any, reader: CheckpointReader) -> None:
    """Each parameter of a model without memory has its tensor, and each tensor its parameter. A
    tied output head need not be stored.

    Raises:
        CheckpointError: naming the first tensor that is wrong, or the first that are left over.
    """
    head = model.get_output_embeddings()
    for name, parameter in model.named_parameters():
        if name not in reader:
            if parameter is head.weight and model.config.tie_word_embeddings:
                continue
            raise CheckpointError(
                f"{reader.folder}: tensor {name} is missing{_others(name, reader)}"
            )
        (found, kind), expected = reader.shape_and_type(name), list(parameter.shape)
        if kind not in TYPES:
            raise CheckpointError(
                f"{reader.folder}: tensor {name} is {kind}: {', '.join(TYPES)} are read, and"
                " F8_E4M3 whose scales quantization_config of config.json names"
            )
        if found != expected:
            raise CheckpointError(
                f"{reader.folder}: tensor {name} is {found}, but config.json asks for {expected}"
            )
    check_all_taken(model, reader)


def check_all_taken(model: Any, reader: CheckpointReader) -> None:
    """No tensor is left over.

    Raises:
        CheckpointError: naming the first that are.
    """
    own = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    left_out = re.compile("|".join(f"(?:{pattern})" for pattern in (*_LEFT_OUT, *own)))
    taken = model.state_dict().keys()
    left = [name for name in reader.names if name not in taken and not left_out.search(name)]
    if left:
        raise CheckpointError(
            f"{reader.folder}: no parameter of the model takes {listed(left, _SHOWN)}:"
            " scales of a quantization, or parts of another model: give a checkpoint whose"
            " config.json says what they are"
        )


def _others(name: str, reader: CheckpointReader) -> str:
    """What stands under a missing parameter's name in its place."""
    found = [each for each in reader.names if each.startswith(name.rpartition(".")[0] + ".")]
    return f", and {', '.join(found[:_SHOWN])} there in its place" if found else ""
