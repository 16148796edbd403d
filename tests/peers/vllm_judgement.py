"""Which scheme and kernel vLLM's own code would choose on a card, asked on any machine. Runs in
vLLM's environment, and knows nothing of this project.

    python vllm_judgement.py 90 < CASES.json > JUDGEMENTS.json

90: the card's compute capability, times ten. A case: name, quantization_config (of an export's
config.json), rows, columns, environment (variables that vLLM is run with); module: its name in
the model, `lm_head` of an output head. Of each: scheme, kernel, the type of the inputs that it
multiplies with, and why not of each kernel that was asked before it; or the error. vLLM is told
that it runs on CUDA on such a card. What its compiled library would say of the card
(`cutlass_scaled_mm_supports_…`) is assumed, not asked: it is not here. No kernel is run.
"""

import json
import os
import sys
from types import ModuleType, SimpleNamespace

import torch
import vllm.platforms as platforms
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum


class Card(Platform):
    _enum = PlatformEnum.CUDA
    device_name = device_type = "cuda"
    dispatch_key = "CUDA"
    number = int(sys.argv[1])

    @classmethod
    def get_device_capability(cls, device_id=0):
        return DeviceCapability(cls.number // 10, cls.number % 10)

    @classmethod
    def get_device_name(cls, device_id=0):
        return f"SM{cls.number}"

    @classmethod
    def fp8_dtype(cls):
        return torch.float8_e4m3fn


platforms._current_platform = Card()

from vllm import _custom_ops as ops  # noqa: E402

# Assumed of its compiled library: FP8 from Ada on, in blocks and in groups from Hopper on.
ops.cutlass_scaled_mm_supports_fp8 = lambda capability: capability >= 89
ops.cutlass_scaled_mm_supports_block_fp8 = lambda capability: capability >= 90
ops.cutlass_group_gemm_supported = lambda capability: capability >= 90

_attention = ModuleType("vllm.vllm_flash_attn")  # compiled, and not asked
_attention.__getattr__ = lambda name: None
sys.modules["vllm.vllm_flash_attn"] = _attention

import vllm.model_executor.kernels.linear as linear  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402

parallel_state._TP = SimpleNamespace(rank_in_group=0, world_size=1)

asked = []  # kernel, why not (None: it is taken)

_choose, _can = linear.choose_mp_linear_kernel, linear.is_supported_and_can_implement_kernel


def choose_mp(config, compute_capability=None):
    chosen = _choose(config, compute_capability)
    for kernel in linear._POSSIBLE_KERNELS[PlatformEnum.CUDA]:
        if kernel is chosen:
            asked.append((kernel.__name__, None))
            break
        if kernel.get_min_capability() > Card.number:
            why = f"from SM{kernel.get_min_capability()} on"
        else:
            why = kernel.can_implement(config)[1]
        asked.append((kernel.__name__, why))
    return chosen


def can(kernel, config, compute_capability):
    good, why = _can(kernel, config, compute_capability)
    asked.append((kernel.__name__, None if good else str(why)))
    return good, why


linear.choose_mp_linear_kernel = choose_mp
linear.is_supported_and_can_implement_kernel = can

from vllm.model_executor.layers.linear import LinearBase  # noqa: E402
from vllm.model_executor.layers.quantization import auto_gptq  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.utils.marlin_utils import (  # noqa: E402
    get_marlin_input_dtype,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: E402


class Head(ParallelLMHead):
    """An output head as far as a scheme looks at it."""

    def __init__(self):
        torch.nn.Module.__init__(self)


class Linear(LinearBase):
    """A linear layer as far as a scheme looks at it."""

    def __init__(self):
        torch.nn.Module.__init__(self)


def judged_head(config, sizes):
    """The method that a head gets, and its scheme: none, where vLLM takes it for 16 bits."""
    known = {"gptq": auto_gptq.AutoGPTQConfig, "compressed-tensors": CompressedTensorsConfig}
    parsed, layer = known[config["quant_method"]].from_config(config), Head()
    parsed.packed_modules_mapping = {}
    method = parsed.get_quant_method(layer, "lm_head")
    if method is None:
        return None
    method.create_weights(layer, **sizes)
    return getattr(layer, "scheme", method)


def judged(case):
    rows, columns = case["rows"], case["columns"]
    config = case["quantization_config"]
    sizes = {
        "input_size_per_partition": columns,
        "output_partition_sizes": [rows],
        "input_size": columns,
        "output_size": rows,
        "params_dtype": torch.bfloat16,
        "weight_loader": lambda *_: None,
    }
    if case.get("module") == "lm_head":
        return judged_head(config, sizes)
    if config["quant_method"] == "gptq":
        method = auto_gptq.AutoGPTQLinearMethod(auto_gptq.AutoGPTQConfig.from_config(config))
        method.input_dtype = get_marlin_input_dtype()  # as `AutoGPTQConfig.get_quant_method` does
        method.create_weights(Linear(), **sizes)
        return method
    parsed = CompressedTensorsConfig.from_config(config)
    parsed.packed_modules_mapping = {}
    layer = Linear()
    scheme = parsed.get_scheme(layer, "model.layers.0.mlp.down_proj")
    scheme.create_weights(layer=layer, **sizes)
    return scheme


def told(case):
    asked.clear()
    os.environ.update(case["environment"])
    try:
        scheme, error = judged(case), None
    except Exception as wrong:
        scheme, error = None, f"{type(wrong).__name__}: {' '.join(str(wrong).split())}"
    for name in case["environment"]:
        del os.environ[name]
    config = getattr(getattr(scheme, "kernel", None), "config", None)
    inputs = str(getattr(config, "act_type", "")).removeprefix("torch.")
    scheme = scheme and type(scheme).__name__
    taken = None if error else next((name for name, why in asked if why is None), None)
    passed = [[name, why] for name, why in asked if why is not None]
    said = {"scheme": scheme, "kernel": taken, "passed over": passed, "error": error}
    return said | {"inputs": inputs}


def main():
    cases, out = json.load(sys.stdin), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints too
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)
    with set_current_vllm_config(config):
        json.dump({case["name"]: told(case) for case in cases}, out)
    out.close()


if __name__ == "__main__":
    main()
