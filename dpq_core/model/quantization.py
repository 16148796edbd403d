"""What a checkpoint says about its own quantization, and what of that is read as 16 bits."""

from pathlib import Path
from typing import Any

from dpq_core.errors import CheckpointError
from dpq_core.model.json_files import read_config, read_json

OF_OTHERS = {  # settings in files of their own, and whose they are
    "quantize_config.json": "gptq",  # AutoGPTQ's, before it wrote into config.json
    "hf_quant_config.json": "modelopt",
}
_BLOCK = (128, 128)  # where `quant_method: fp8` names none: transformers' FineGrainedFP8Config


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says about its quantization, `quant_method` included; None: 16 bits.

    `config.json` has it for the whole model or, where transformers looks too, for its text model.

    Raises:
        CheckpointError: `config.json` has a `quantization_config` that names no method.
    """
    config = read_config(folder)
    text = config.get("text_config")
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None and isinstance(text, dict):
        found = text.get("quantization_config")
    if found is not None and not (isinstance(found, dict) and "quant_method" in found):
        raise CheckpointError(f"{folder / 'config.json'}: quantization_config has no quant_method")
    for name, method in OF_OTHERS.items():
        if found is None and (folder / name).is_file():
            return {"quant_method": method} | read_json(folder / name)
    return found


def reads_fp8(quantization: dict[str, Any] | None) -> bool:
    """Whether a checkpoint's weights are FP8 with scales that `dpq_core.model.fp8` reads."""
    if quantization is None:
        return False
    method = quantization["quant_method"]
    if method == "compressed-tensors":
        return _only_fp8(quantization)
    return method in ("fp8", "fbgemm_fp8")


def keeps_fp8_cache(folder: Path) -> bool:
    """Whether it is a native checkpoint whose keys and values are kept in FP8."""
    found = read_config(folder).get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "dpq":
        return False
    return found.get("kv_cache") == "fp8"


def scale_block(quantization: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None: a scale for each row, or one for all.

    Raises:
        CheckpointError: no two positive numbers.
    """
    found: Any = None
    if quantization["quant_method"] == "fp8":
        found = quantization.get("weight_block_size", _BLOCK)
    for weights in _groups(quantization):
        found = found or weights.get("block_structure")
        if weights.get("strategy") == "group":
            found = (1, weights.get("group_size"))
    if found is None:
        return None
    sides = tuple(found) if isinstance(found, list | tuple) else ()
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise CheckpointError(f"config.json: {found!r} is no size of FP8's blocks: [128, 128] is")
    return sides


def described(quantization: dict[str, Any]) -> str:
    """`'compressed-tensors' (pack-quantized)`."""
    whole = quantization.get("format") or quantization.get("quant_algo")
    return f"{quantization['quant_method']!r}" + (f" ({whole})" if whole else "")


def _only_fp8(quantization: dict[str, Any]) -> bool:
    """All layers that compressed-tensors names have FP8 weights, and nothing is done to them but
    scaling."""
    sparsity = quantization.get("sparsity_config") or {}
    if quantization.get("transform_config") or sparsity.get("format", "dense") != "dense":
        return False
    groups = _groups(quantization)
    blocks = {str((each.get("strategy"), each.get("block_structure"))) for each in groups}
    mixed = len(blocks) > 1 and any("block" in name or "group" in name for name in blocks)
    return (
        bool(groups)
        and not mixed
        and all(
            each.get("type") == "float"
            and each.get("num_bits") == 8
            and each.get("symmetric", True)
            for each in groups
        )
    )


def _groups(quantization: dict[str, Any]) -> list[dict[str, Any]]:
    """compressed-tensors' arguments of weights; of a preset's name, an empty one."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict):
        return []
    found: list[dict[str, Any]] = []
    for each in groups.values():
        weights = each.get("weights") if isinstance(each, dict) else {}
        found.append(weights if isinstance(weights, dict) else {})
    return found
