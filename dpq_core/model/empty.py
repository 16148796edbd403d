"""Models of transformers without memory: of a checkpoint's configuration, or of a smaller one."""

from threading import RLock
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dpq_core.experts import separate_experts
from dpq_core.families import family_of
from dpq_core.sixteen_bit import fit

# While accelerate makes empty weights, it redirects the parameters that any thread sets: whoever
# builds or fills a model holds this.
building = RLock()


def empty_of(config: Any, trust_remote_code: bool = False) -> Any:
    """The transformers model of a configuration, parameters without memory, experts one by one.

    Sixteen-bit checkpoints keep their type; anything wider is run in BF16.

    Raises:
        ValueError: transformers has no language model for it.
    """
    half = (torch.bfloat16, torch.float16)
    dtype = config.dtype if config.dtype in half else torch.bfloat16
    vision = family_of(config.model_type).vision is not None
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    with building, init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        separate_experts(model, family_of(config.model_type).experts)
    return fit(model).eval()


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
    return fit(other).eval()
