"""Other people's quantized checkpoints, loaded to be compared with ours.

compressed-tensors: by transformers and the `compressed-tensors` package, as anyone else loads them;
linears then round their inputs as the checkpoint's scheme says. Both only warn, or say nothing,
where tensors are missing, unused or of another shape: here that is an error.

GPTQ: its own package does not install beside our stack, so the weights are dequantized here, and
16-bit linears run them (W4A16 or W8A16). For input k and output n, in the model's 16-bit type:

    W[n, k] = scales[g, n] · (q[k, n] − z[g, n])        g = g_idx[k], or k // group_size

`scales` are rounded to that type first, the difference is exact in it, and the product is rounded
once: the arithmetic of the kernels that hold their scales in the model's type. Layout, with
p = 32 / bits codes an int32, lowest bits first:

    qweight  int32 [in / p, out]    q, packed along the input
    qzeros   int32 [G, out / p]     z (`gptq_v2`) or z − 1 modulo 2**bits (`gptq`, as in AutoGPTQ)
    scales   float [G, out]
    g_idx    int32 [in]             needed where `desc_act` ordered the inputs
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import apply_quantization_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpq_core.reader import CheckpointError, CheckpointReader, read_config, read_json
from dpq_core.streaming import empty_model, fill_parameters

_OLD_GPTQ = "quantize_config.json"  # AutoGPTQ's, before it wrote into config.json
_NOT_RUN = ("kv_cache_scheme", "transform_config")  # of compressed-tensors


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says about its quantization, `quant_method` included; None: 16 bits.

    Raises:
        CheckpointError: it is no JSON object, or does not name its method.
    """
    found = read_config(folder).get("quantization_config")
    if found is None and (folder / _OLD_GPTQ).is_file():
        return {"quant_method": "gptq"} | read_json(folder / _OLD_GPTQ)
    if found is not None and not (isinstance(found, dict) and "quant_method" in found):
        raise CheckpointError(f"{folder / 'config.json'}: quantization_config has no quant_method")
    return found


def load_foreign(folder: Path, device: torch.device | str = "cpu") -> Any:
    """A transformers causal LM from a third party's checkpoint; see the module for its arithmetic.

    Raises:
        CheckpointError: a method, format or number of bits that is not supported, or a tensor that
            is missing, unused, of another shape, or not finite.
    """
    quantization = quantization_of(folder) or {}
    method = quantization.get("quant_method")
    if method not in _LOADERS:
        raise CheckpointError(
            f"{folder}: quant_method {method!r} is not supported: known are {', '.join(_LOADERS)}, "
            "16-bit checkpoints, and ours; give the checkpoint in one of these"
        )
    model = _LOADERS[method](folder, quantization)
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise CheckpointError(f"{folder}: {name} is not finite once loaded")
    return model.to(device).eval()


def _compressed_tensors(folder: Path, quantization: Mapping[str, Any]) -> Any:
    for key in _NOT_RUN:
        if quantization.get(key):
            raise CheckpointError(
                f"{folder}: {key} is set, which transformers does not apply in evaluation: "
                "give a checkpoint that was made without it"
            )
    CheckpointReader(folder)  # says what is wrong with the files
    expected = empty_model(folder)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=_with_group_formats(folder),
            dtype=expected.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        _refuse_incomplete(folder, loading)
        compressor = model.hf_quantizer.compressor
        compressor.decompress_model(model)  # else at the first forward, with its errors
        apply_quantization_config(expected, compressor.quantization_config, show_progress=False)
    except CheckpointError:
        raise
    except Exception as error:  # whatever two libraries raise about a file that they cannot read
        raise CheckpointError(
            f"{folder}: transformers and compressed-tensors cannot load it "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        ) from error
    _refuse_misshapen(folder, model, expected)
    return model


def _with_group_formats(folder: Path) -> Any:
    """The configuration, with the checkpoint's format where a group of linears has none.

    The package would guess one from the scheme, and guesses wrong for 4-bit weights with FP8 inputs.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    quantization = config.quantization_config
    one_format = quantization.get("format") != "mixed-precision"
    if one_format and quantization.get("quantization_status") == "compressed":
        for group in quantization["config_groups"].values():
            if isinstance(group, dict) and not group.get("format"):  # else a preset's name
                group["format"] = quantization["format"]
    return config


def _refuse_incomplete(folder: Path, loading: Mapping[str, Any]) -> None:
    for what, names in loading.items():  # missing_keys, unexpected_keys, …
        if names:
            first, *others = sorted(map(str, names))
            more = f" and {len(others)} more" if others else ""
            raise CheckpointError(
                f"{folder}: {what.replace('_', ' ')}: {first}{more}; the quantization_config in "
                "config.json does not describe these tensors"
            )


def _refuse_misshapen(folder: Path, model: Any, expected: Any) -> None:
    """transformers does not compare shapes where a quantizer is at work, and scales broadcast."""
    found = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        if name not in found or found[name].shape != parameter.shape:
            shape = list(found[name].shape) if name in found else "missing"
            raise CheckpointError(
                f"{folder}: {name} is {shape} once loaded, but config.json asks for "
                f"{list(parameter.shape)}"
            )


@dataclass(frozen=True)
class _GptqFormat:
    """group_size: −1 is one group for all inputs. zero_offset: what the stored zero points lack."""

    bits: int
    group_size: int
    desc_act: bool
    zero_offset: int

    def shapes(self, rows: int, features: int) -> dict[str, tuple[list[int], tuple[str, ...]]]:
        """Shape and possible safetensors types of the tensors of a linear [rows, features]."""
        codes = 32 // self.bits
        groups = 1 if self.group_size == -1 else -(-features // self.group_size)
        return {
            "qweight": ([-(-features // codes), rows], ("I32",)),
            "qzeros": ([groups, -(-rows // codes)], ("I32",)),
            "scales": ([groups, rows], ("F16", "BF16", "F32")),
            "g_idx": ([features], ("I32",)),
        }


def _gptq_format(folder: Path, quantization: Mapping[str, Any]) -> _GptqFormat:
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    layout = quantization.get("checkpoint_format", "gptq")
    if bits not in (4, 8):
        raise CheckpointError(f"{folder}: GPTQ with bits {bits!r}: supported are 4 and 8")
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise CheckpointError(
            f"{folder}: GPTQ with group_size {group_size!r}: expected a number of inputs, or -1"
        )
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"{folder}: GPTQ with checkpoint_format {layout!r}: supported are gptq and gptq_v2"
        )
    offset = 1 if layout == "gptq" else 0
    return _GptqFormat(bits, group_size, bool(quantization.get("desc_act")), offset)


def _gptq(folder: Path, quantization: Mapping[str, Any]) -> Any:
    fmt = _gptq_format(folder, quantization)
    reader, model = CheckpointReader(folder), empty_model(folder)
    used = set(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.qweight" in reader:
            tensors = _gptq_tensors(reader, name, module, fmt)
            used |= {f"{name}.{suffix}" for suffix in tensors}
            weight = dequantize_gptq(tensors, module.in_features, fmt, model.dtype)
            module.weight = nn.Parameter(weight[: module.out_features], requires_grad=False)
    _refuse_unused(reader, used)
    head = model.get_output_embeddings()
    tied = model.config.tie_word_embeddings and "lm_head.weight" not in reader
    if tied:
        head.weight = None
    fill_parameters(model, "", reader, model.dtype)
    if tied:
        head.weight = model.get_input_embeddings().weight
    return model
