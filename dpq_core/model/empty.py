"""Models of transformers without memory: of a checkpoint's configuration, or of a smaller one."""

import re
from collections.abc import Iterable
from threading import RLock
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from dpq_core.kernels.sixteen_bit import fit
from dpq_core.model.experts import separate_experts
from dpq_core.model.families import family_of

# While accelerate makes empty weights, it redirects the parameters that any thread sets: whoever
# builds or fills a model holds this.
building = RLock()


def empty_of(
    config: Any, trust_remote_code: bool = False, wider: torch.dtype = torch.bfloat16
) -> Any:
    """The transformers model of a configuration, parameters without memory, experts one by one.

    Sixteen-bit checkpoints keep their type; anything wider is run in `wider`.

    Raises:
        ValueError: transformers has no language model for it.
    """
    dtype = sixteen_bits(config, wider)
    of_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "auto_map" in vars(config)
    auto = AutoModelForCausalLM if of_text else AutoModelForImageTextToText
    with building, init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        separate_experts(model, family_of(config.model_type).experts)
    return _finished(model)


def sixteen_bits(config: Any, wider: torch.dtype) -> torch.dtype:
    """The type that a model of this configuration runs in: its own, or `wider` where that has more
    bits, or none is said."""
    found: torch.dtype = config.dtype
    return found if found in (torch.bfloat16, torch.float16) else wider


def empty_like(model: Any, config: Any, separate: bool = True) -> Any:
    """A model of the same class and type with another configuration, without memory.

    separate: experts one by one; else as transformers keeps them, run by its plain loop.
    """
    with building, init_empty_weights(include_buffers=False):
        other = type(model)._from_config(config, dtype=model.dtype)
        if separate:
            separate_experts(other, family_of(config.model_type).experts)
        else:
            other.config._experts_implementation = "eager"
    return _finished(other)


def _finished(model: Any) -> Any:
    """Ready to be filled; what the architecture keeps in FP32 (a router's correction) is FP32."""
    for module_name, module in model.named_modules():
        held = {**module._parameters, **module._buffers}
        for name in keeps_wide(model, [f"{module_name}.{each}" for each in held]):
            tensor = held[name.rpartition(".")[2]]
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.float()
    return fit(model).eval()


def keeps_wide(model: Any, names: Iterable[str]) -> list[str]:
    """Those of these tensors that the architecture keeps in FP32 in a model of 16 bits."""
    patterns = [rf"(^|\.){name}($|\.)" for name in model._keep_in_fp32_modules_strict or ()]
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
