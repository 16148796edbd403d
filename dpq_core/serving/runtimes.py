"""What computes a quantized linear when speed counts: one row a runtime, chosen by device, and on a
CPU by what the processor has: the first that can run.

Every runtime is a module made of a layer and its bias, as `W4A8Linear` is, which stays the
definition: a runtime is right when its error against float64 is at most twice the definition's.
What a runtime has no kernel for, it refuses with a reason; such layers are computed by the
definition and named, so that nobody takes their time for the kernel's.
"""

from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor, nn

from dpq_core.errors import InputError
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.records import QuantizedLinear


class RuntimeUnavailableError(InputError):
    """A runtime that this machine, or what is installed on it, cannot run."""


@dataclass(frozen=True)
class Runtime:
    """A row of the table. Its module, imported when it is asked for, defines

        unavailable() -> str                    why it cannot run here, or nothing
        refusal(layer: QuantizedLinear) -> str  why it has no kernel for a layer, or nothing
        make(layer: QuantizedLinear, bias: Tensor | None) -> nn.Module

    device: the type of torch device whose models it serves. note: what a reader of its numbers has
    to know.
    """

    name: str
    device: str
    module: str
    note: str = ""


# Of the bits that runtimes compute: raised with any change to them. In keys of what is served.
VERSION = 2

RUNTIMES = {
    r.name: r
    for r in (
        Runtime("cpu", "cpu", "dpq_core.serving.cpu"),  # AMX
        Runtime("avx2", "cpu", "dpq_core.serving.avx2"),
        Runtime("hopper", "cuda", "dpq_core.serving.hopper"),
        Runtime("gaudi", "hpu", "dpq_core.serving.gaudi", "not tested on hardware"),
    )
}


def other_arithmetic(layer: QuantizedLinear, kernel: str) -> str:
    """Why what multiplies E4M3 by E4M3, or in 16 bits, does not compute a layer, or nothing.
    kernel: what the runtime calls it."""
    scheme = layer.scheme
    if isinstance(layer.weight, Tensor):
        return "16-bit weights, which an ordinary linear multiplies"
    if scheme.inner == "none" and scheme.activations != "none":
        return f"no {kernel} for E4M3 inputs with weights that are not rounded to E4M3"
    if scheme.inner == "int8":
        return f"no INT8 {kernel}: there are E4M3 and 16-bit arithmetic"
    if scheme.inner == "e4m3" and scheme.activations == "none":
        return "E4M3 weights, but 16-bit activations: set activations: dynamic or static"
    return ""


@dataclass
class Chosen:
    """A runtime's modules where it has a kernel, the definition elsewhere; `load_quantized` takes
    it as `linear`. refused: reason → how many layers."""

    runtime: Runtime
    refused: dict[str, int] = field(default_factory=dict)

    def __call__(self, layer: QuantizedLinear, bias: Tensor | None) -> nn.Module:
        kernels = import_module(self.runtime.module)
        reason = kernels.refusal(layer)
        if reason:
            self.refused[reason] = self.refused.get(reason, 0) + 1
            return W4A8Linear(layer, bias)
        module: nn.Module = kernels.make(layer, bias)
        return module


def runtime_for(device: torch.device) -> Chosen:
    """The runtime of a device.

    Raises:
        RuntimeUnavailableError: none, or not here, and why.
    """
    rows = [row for row in RUNTIMES.values() if row.device == device.type]
    if not rows:
        devices = dict.fromkeys(row.device for row in RUNTIMES.values())
        raise RuntimeUnavailableError(f"no W4A8 runtime for {device}: choose {', '.join(devices)}")
    reasons = []
    for row in rows:
        reason = import_module(row.module).unavailable()
        if not reason:
            return Chosen(row)
        reasons.append(f"the {row.name} runtime cannot run here: {reason}")
    raise RuntimeUnavailableError("; ".join(reasons))
