"""A 16-bit model as others publish it in FP8, written by other code than ours."""

import json

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file

FP8 = torch.float8_e4m3fn


def by_blocks(weight, block):
    """Codes, and a scale [blocks down, blocks across] FP32 for each block."""
    rows, columns = weight.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(down * block[0], across * block[1])
    padded[:rows, :columns] = weight
    tiles = padded.view(down, block[0], across, block[1])
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return codes.to(FP8), scale


def written(folder, model, quantization, scaled, dtype="bfloat16"):
    """A checkpoint whose linears are what `scaled` makes of a weight: codes, and tensors beside
    them by the ends of their names."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, weight in model.state_dict().items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight
            continue
        codes, beside = scaled(weight.float())
        tensors[name] = codes
        tensors |= {name.removesuffix("weight") + end: tensor for end, tensor in beside.items()}
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"dtype": dtype, "architectures": ["LlamaForCausalLM"]}
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def deepseek(folder, model, block=(32, 64), **changes):
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(block),
    }

    def scaled(weight):
        codes, scale = by_blocks(weight, block)
        return codes, {"weight_scale_inv": scale}

    return written(folder, model, quantization, scaled, **changes)


def mistral(folder, model):
    """A scale a matrix, and static scales of activations."""
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
    }

    def scaled(weight):
        codes, scale = by_blocks(weight, weight.shape)
        return codes, {
            "weight_scale_inv": scale.bfloat16().reshape(()),
            "activation_scale": torch.ones((), dtype=torch.bfloat16),
        }

    return written(folder, model, quantization, scaled)


def fbgemm(folder, model):
    quantization = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}

    def scaled(weight):
        codes, scale = by_blocks(weight, (1, weight.shape[1]))
        return codes, {"weight_scale": scale}

    return written(folder, model, quantization, scaled)


def llm_compressor(folder, model, strategy="channel", scale_type=torch.bfloat16, static=False):
    block = [64, 64] if strategy == "block" else None
    weights = QuantizationArgs(num_bits=8, type="float", strategy=strategy, block_structure=block)
    inputs = (
        QuantizationArgs(num_bits=8, type="float", strategy="tensor")
        if static
        else QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    )
    scheme = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs, format="float-quantized"
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="float-quantized",
        ignore=["lm_head"],
        quantization_status="compressed",
    )

    def scaled(weight):
        sides = {"channel": (1, weight.shape[1]), "tensor": weight.shape, "block": (64, 64)}
        scale = by_blocks(weight, sides[strategy])[1].to(scale_type)
        wide = scale.float().repeat_interleave(sides[strategy][0], 0)
        wide = wide.repeat_interleave(sides[strategy][1], 1)
        beside = {"weight_scale": scale.reshape(1) if strategy == "tensor" else scale}
        if static:
            beside["input_scale"] = torch.full((1,), 0.01, dtype=scale_type)
        return (weight / wide).clamp(-448, 448).to(FP8), beside

    quantization = json.loads(config.model_dump_json()) | {"quant_method": "compressed-tensors"}
    return written(folder, model, quantization, scaled)
