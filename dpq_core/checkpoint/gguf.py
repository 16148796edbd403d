"""A GGUF file as a folder of 16-bit safetensors that every command here reads.

transformers reads the file (architecture, names, tokenizer) and dequantizes it to FP32. A model is
quantized from 16 bits, so each parameter must be the same number there: in BF16, or all of them in
FP16. What llama.cpp made of a 16-bit model by `--outtype bf16` or `f16` is. Q8_0, Q4_0 and the
K-quants are products of a scale of 11 significant bits and a code, which have more than 16 bits
hold: such a file is refused, or its model rounded to BF16 where that is asked for.
"""

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpq_core.errors import CheckpointError, check_extra, first_line
from dpq_core.model.source import check_source

_TYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Imported:
    """stored_as: the file's types with how many tensors have each. dtype: of the folder. rounded:
    parameters that are not the same numbers there, with the largest difference of a weight,
    relative to its tensor's largest."""

    stored_as: dict[str, int]
    dtype: str
    rounded: int
    difference: float


def import_gguf(file: Path, folder: Path, rounded: bool = False) -> Imported:
    """Write a file's model and tokenizer to a folder, which appears when it is complete.

    Memory: the model in FP32, 4 bytes a weight.

    Args:
        rounded: take a model that 16 bits do not hold, rounded to BF16.

    Raises:
        CheckpointError: no such file, or none that transformers reads; a folder that holds
            something; a parameter that 16 bits do not hold, unless `rounded`.
        MissingExtraError: the package `gguf` is not installed.
    """
    check_extra("dpq import", "gguf", "gguf")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: holds something already: name a folder that is not there")
    stored_as = _types_in(file)
    model, tokenizer = _read(file)
    wrong = {dtype: _differences(model, dtype) for dtype in _TYPES}
    dtype = next((each for each in _TYPES if not wrong[each]), torch.bfloat16)
    if wrong[dtype] and not rounded:
        name, difference = next(iter(wrong[dtype].items()))
        raise CheckpointError(
            f"{file}: {name} is not the same number in 16 bits (off by up to {difference:.1e} of"
            f" its largest): the file holds {_counted(stored_as)}, and is a quantized model: give"
            " the BF16 or F16 file that it was made of, or round it with --rounded"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        made = Path(work, "model")
        model.to(dtype).save_pretrained(made)
        tokenizer.save_pretrained(made)
        check_source(made)
        shutil.rmtree(folder, ignore_errors=True)  # it is empty
        made.replace(folder)
    found = wrong[dtype]
    name_of_type = str(dtype).removeprefix("torch.")
    return Imported(stored_as, name_of_type, len(found), max(found.values(), default=0.0))


def _types_in(file: Path) -> dict[str, int]:
    from gguf import GGUFReader

    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        tensors = GGUFReader(file).tensors
    except Exception as error:  # whatever NumPy says of bytes that are not there
        raise CheckpointError(
            f"{file}: not a GGUF file that can be read: {_said(error)}"
        ) from error
    if not tensors:
        raise CheckpointError(f"{file}: a GGUF file without tensors, of a vocabulary perhaps")
    return dict(Counter(each.tensor_type.name for each in tensors).most_common())


def _read(file: Path) -> tuple[Any, Any]:
    """The model in FP32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    named: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, quantization_config=config, **named
        )
        return model, AutoTokenizer.from_pretrained(file.parent, **named)
    except Exception as error:  # an architecture or a tokenizer that it does not know: many types
        raise CheckpointError(f"{file}: transformers does not read it: {_said(error)}") from error


def _differences(model: Any, dtype: torch.dtype) -> dict[str, float]:
    """Parameters that are other numbers in `dtype`, and by how much of their largest."""
    found = {}
    for name, parameter in model.named_parameters():
        weight: Tensor = parameter.detach()
        error = (weight.to(dtype).float() - weight).abs().max()
        if error != 0:  # NaN too
            found[name] = float(error / weight.abs().max())
    return found


def _counted(types: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in types.items())


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
