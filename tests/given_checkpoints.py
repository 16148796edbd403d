"""Checkpoints of 4 bits as GPTQ, AWQ and compressed-tensors have them, packed by NumPy alone."""

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LAYOUTS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of AutoAWQ's `pack_intweight`: column of each nibble


def words(values, order=range(8)):
    """[n, m] of 0…15 → [n, m / 8] int32: nibble i has column order[i] of its eight."""
    eights = values.astype(np.uint32).reshape(len(values), -1, 8)
    packed = np.zeros(eights.shape[:2], dtype=np.uint32)
    for nibble, column in enumerate(order):
        packed |= eights[:, :, column] << np.uint32(4 * nibble)
    return torch.from_numpy(packed.view(np.int32).copy())


def nearest(weight, group_size, symmetric):
    """Codes [N, K], zero points [N, G] and FP16 scales [N, G] of a weight [N, K], NumPy."""
    groups = weight.reshape(len(weight), -1, group_size)
    low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    width = 2 * np.maximum(high, -low) if symmetric else high - low
    scales = (np.maximum(width, 1e-4) / 15).astype(np.float16)
    zeros = np.full(scales.shape, 8.0) if symmetric else np.round(-low / scales)
    zeros = np.clip(zeros, 0, 15)
    codes = np.round(groups / scales[:, :, None]) + zeros[:, :, None]
    codes = np.clip(codes, 0, 15).reshape(weight.shape)
    return codes.astype(np.uint8), zeros.astype(np.uint8), scales


def stored(layout, codes, zeros, scales, symmetric):
    """A layer's tensors as a layout has them."""
    rows, columns = codes.shape
    size, half = columns // scales.shape[1], torch.from_numpy(scales)
    if layout == "compressed-tensors":
        found = {
            "weight_packed": words(codes),
            "weight_scale": half.bfloat16(),
            "weight_shape": torch.tensor([rows, columns]),
        }
        return found if symmetric else found | {"weight_zero_point": words(zeros.T).T}
    if layout == "awq":
        packed, order = words(codes.T, AWQ_ORDER), AWQ_ORDER
        return {"qweight": packed, "qzeros": words(zeros.T, order), "scales": half.T}
    offset = 1 if layout == "gptq" else 0
    return {
        "qweight": words(codes).T,
        "qzeros": words((zeros.T.astype(np.int64) - offset) % 16),
        "scales": half.T,
        "g_idx": torch.arange(columns, dtype=torch.int32) // size,
    }


def config_of(layout, group_size, symmetric):
    if layout == "compressed-tensors":
        weights = {"type": "int", "num_bits": 4, "strategy": "group"}
        weights |= {"group_size": group_size, "symmetric": symmetric}
        return {
            "quant_method": layout,
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": ["lm_head"],
        }
    if layout == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
    about = {"bits": 4, "group_size": group_size, "sym": symmetric, "desc_act": False}
    return {"quant_method": "gptq", "checkpoint_format": layout} | about


def give(folder, layout, group_size=32, symmetric=True, change=lambda tensors: None):
    """Turn a checkpoint of 16 bits, in place, into one of codes; codes, zero points and scales of
    each linear. change: of all tensors before they are written."""
    tensors, given = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        linear = name.removesuffix(".weight")
        weight = tensors.pop(name).float().numpy()
        given[linear] = codes, zeros, scales = nearest(weight, group_size, symmetric)
        if layout == "compressed-tensors":
            given[linear] = codes, zeros, torch.from_numpy(scales).bfloat16().float().numpy()
        for part, tensor in stored(layout, codes, zeros, scales, symmetric).items():
            tensors[f"{linear}.{part}"] = tensor
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = config_of(layout, group_size, symmetric)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return given


def meant(codes, zeros, scales):
    """s · (k − z) [N, K], float64."""
    size = codes.shape[1] // scales.shape[1]
    steps = codes.astype(np.float64) - zeros.astype(np.float64).repeat(size, 1)
    return steps * scales.astype(np.float64).repeat(size, 1)
