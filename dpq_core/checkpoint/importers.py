"""Other people's quantized checkpoints, for comparison: GPTQ and compressed-tensors.

GPTQ (AutoGPTQ, GPTQModel) stores a linear layer [N, K] with groups of columns as

    qweight [K · bits / 32, N] int32   codes along K, lowest bits first
    qzeros  [G, N · bits / 32] int32   zero points along N; minus one unless `gptq_v2`
    scales  [G, N] fp16, g_idx [K] int32 (needed where `desc_act` ordered the columns)

    weight[n, k] = scales[g, n] · (code[k, n] − zero[g, n])        g = g_idx[k], or k // group_size

The product is made in float32 and kept in the model's 16-bit type: arithmetic in 16 bits, as these
checkpoints are run (W4A16). Layout: the GPTQ reference code and AutoGPTQ's `qlinear`.

compressed-tensors is loaded by transformers with the library of that name, activations' rounding
included. What it would load only by leaving something out is refused, and so are tensors of another
shape, which neither of the two compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

from dpq_core.kernels.sixteen_bit import fit
from dpq_core.model.reader import CheckpointError, CheckpointReader
from dpq_core.model.streaming import empty_model

SUPPORTED = ("FP8 with scales", "compressed-tensors", "awq", "gptq")


def fill_gptq(model: nn.Module, reader: CheckpointReader, config: dict[str, Any]) -> None:
    """Give the empty linears of `model` their dequantized weights, in its own type.

    Args:
        config: `quantization_config` of the checkpoint's `config.json`.

    Raises:
        CheckpointError: bits, a group size or a format that is not read; a tensor that is missing,
            not finite, of another shape or type, or that no parameter of the model takes.
    """
    layout = _gptq_layout(reader.folder, config)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.qweight" in reader
    }
    if not linears:
        raise CheckpointError(f"{reader.folder}: no layer has a qweight, as GPTQ would write it")
    _check_head(model, reader)
    _check_all_used(reader, {*model.state_dict(), *_gptq_names(linears)})
    reader.check_finite()
    for name, linear in linears.items():
        tensors = _layer(reader, name, linear, layout)
        weight = _dequantize(tensors, layout).to(linear.weight.dtype).contiguous()
        linear.weight = nn.Parameter(weight, requires_grad=False)


def load_compressed_tensors(folder: Path) -> Any:
    """The transformers model of a compressed-tensors checkpoint, on the CPU.

    Raises:
        CheckpointError: a variant that transformers does not load, or tensors left over or out.
    """
    from compressed_tensors.offload import remove_dispatch  # slow to import
    from compressed_tensors.quantization import apply_quantization_config

    expected = empty_model(folder)
    config = _with_group_formats(folder)
    try:
        scheme = CompressedTensorsConfig.from_dict({**config.quantization_config})
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=expected.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        with torch.inference_mode():  # the library unpacks at the first forward
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
        apply_quantization_config(expected, scheme.quantization_config, show_progress=False)
    except Exception as error:  # of transformers, compressed-tensors, torch
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{folder}: transformers does not load this variant of compressed-tensors: {said}:"
            " integer weights in pack-quantized or int-quantized format load"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            name = sorted(map(str, info[what]))[0]
            raise CheckpointError(
                f"{folder}: {len(info[what])} {what.replace('_', ' ')}, {name} the first: the"
                " checkpoint does not fit its quantization_config"
            )
    _check_loaded(folder, model, expected)
    # Else what is moved to a device stays in the library's own memory on the host.
    return fit(remove_dispatch(model))


def _with_group_formats(folder: Path) -> Any:
    """The configuration, with the checkpoint's format where a group of layers names none.

    The library would guess one, and guesses wrong for packed weights with FP8 inputs.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    quantization = config.quantization_config
    if quantization.get("transform_config"):
        raise CheckpointError(
            f"{folder}: transform_config is set, which transformers does not apply: give a"
            " checkpoint without rotations at run time"
        )
    whole = quantization.get("format")
    if quantization.get("quantization_status") == "compressed" and whole != "mixed-precision":
        for group in (quantization.get("config_groups") or {}).values():
            if isinstance(group, dict):  # else the name of a preset
                group["format"] = group.get("format") or whole
    return config


def _check_loaded(folder: Path, model: nn.Module, expected: nn.Module) -> None:
    """Each parameter is there, finite, and of the shape that the configuration asks for.

    A scale of another shape would be broadcast.
    """
    found = dict(model.named_parameters(remove_duplicate=False))  # a tied head is one as well
    for name, parameter in expected.named_parameters():
        loaded = found.get(name)
        shape = None if loaded is None else list(loaded.shape)
        scalars = loaded is not None and loaded.numel() == parameter.numel() == 1
        if shape != list(parameter.shape) and not scalars:
            raise CheckpointError(
                f"{folder}: {name} is {shape or 'missing'}, but config.json asks for"
                f" {list(parameter.shape)}"
            )
    for name, loaded in found.items():
        if loaded.is_floating_point() and not torch.isfinite(loaded.float()).all():
            raise CheckpointError(f"{folder}: {name} has NaN or an infinite value")


def unsupported(folder: Path, method: object) -> CheckpointError:
    """The error for any other `quant_method`."""
    return CheckpointError(
        f"{folder}: quant_method {method!r} is not read: 16 bits, our own,"
        f" {', '.join(SUPPORTED[:-1])} and {SUPPORTED[-1]} are"
    )


@dataclass(frozen=True)
class _Layout:
    """group_size: -1 is all columns. ordered: g_idx says which group a column is in. offset: what
    zero points were stored without."""

    bits: int
    group_size: int
    ordered: bool
    offset: int


def _gptq_layout(folder: Path, config: Mapping[str, Any]) -> _Layout:
    bits, group_size = config.get("bits"), config.get("group_size", -1)
    file_format = config.get("checkpoint_format", "gptq")
    if bits not in (4, 8):
        raise CheckpointError(f"{folder}: GPTQ of {bits} bits is not read, 4 or 8 are")
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise CheckpointError(
            f"{folder}: GPTQ in groups of {group_size!r} is not read: a number of columns is, or -1"
        )
    if file_format not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"{folder}: GPTQ's checkpoint_format {file_format!r} is not read, gptq and gptq_v2 are"
        )
    offset = 1 if file_format == "gptq" else 0
    return _Layout(bits, group_size, bool(config.get("desc_act")), offset)


def _gptq_names(linears: Mapping[str, nn.Module]) -> list[str]:
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return [f"{name}.{part}" for name in linears for part in parts]


def _check_head(model: Any, reader: CheckpointReader) -> None:
    """The output head is stored, quantized or not, or said to be the input embedding; not both."""
    tied = model.config.tie_word_embeddings
    if tied and "lm_head.qweight" in reader:
        raise CheckpointError(
            f"{reader.folder}: lm_head.qweight is a head of its own, but config.json ties it to the"
            " embedding: tie_word_embeddings: false is what such a checkpoint needs"
        )
    if not tied and not ("lm_head.qweight" in reader or "lm_head.weight" in reader):
        raise CheckpointError(
            f"{reader.folder}: tensor lm_head.weight is missing, and config.json does not tie the"
            " output head to the embedding"
        )


def _check_all_used(reader: CheckpointReader, used: set[str]) -> None:
    """But for biases of zeros, which AutoGPTQ adds, and the rotations that old files hold."""
    for name in reader.names:
        if name in used or name.endswith("rotary_emb.inv_freq"):
            continue
        if not name.endswith(".bias") or reader.tensor(name).any():
            raise CheckpointError(
                f"{reader.folder}: tensor {name} has no place in the model of config.json"
            )


def _layer(
    reader: CheckpointReader, name: str, linear: nn.Linear, layout: _Layout
) -> dict[str, Tensor]:
    """A layer's tensors, their shapes and types checked, `g_idx` among them."""
    rows, features = linear.out_features, linear.in_features
    group_size = features if layout.group_size == -1 else layout.group_size
    groups = -(-features // group_size)
    codes = 32 // layout.bits  # in an int32
    shapes = {
        "qweight": [-(-features // codes), rows],
        "qzeros": [groups, -(-rows // codes)],
        "scales": [groups, rows],
        "g_idx": [features],
    }
    if not layout.ordered and f"{name}.g_idx" not in reader:
        del shapes["g_idx"]
    tensors = reader.tensors(f"{name}.{part}" for part in shapes)
    found = {part: tensors[f"{name}.{part}"] for part in shapes}
    for part, shape in shapes.items():
        if list(found[part].shape) != shape:
            raise CheckpointError(
                f"{reader.folder}: tensor {name}.{part} is {list(found[part].shape)}, but"
                f" {layout.bits} bits in groups of {group_size} ask for {shape}"
            )
        if (found[part].dtype == torch.int32) == (part == "scales"):
            kind = "floats" if part == "scales" else "int32"
            raise CheckpointError(
                f"{reader.folder}: tensor {name}.{part} is {found[part].dtype}, expected {kind}"
            )
    found["g_idx"] = found.get("g_idx", torch.arange(features) // group_size).long()
    if found["g_idx"].min() < 0 or found["g_idx"].max() >= groups:
        raise CheckpointError(f"{reader.folder}: {name}.g_idx points outside of {groups} groups")
    return found


def _dequantize(tensors: Mapping[str, Tensor], layout: _Layout) -> Tensor:
    """[out, in] fp32, by the formula above."""
    scales, groups = tensors["scales"].float(), tensors["g_idx"]
    codes = _unpack(tensors["qweight"].T, layout.bits)[:, : len(groups)]  # [N, K]
    zeros = _unpack(tensors["qzeros"], layout.bits)[:, : scales.shape[1]]  # [G, N]
    zeros = (zeros + layout.offset) % (1 << layout.bits)  # zero is stored as the highest code
    return scales[groups].T * (codes - zeros[groups].T)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """[rows, words] int32, lowest bits first → [rows, words · 32 / bits] int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)
