"""How operands of BF16 are multiplied on this machine's CPU: chosen here, once, for everything.

    y = bf16(Σ a · b + bias)      operands in BF16, sums in FP32, one rounding

The product of two BF16 numbers is exact in FP32. So the BF16 units of a processor (AVX512_BF16,
AMX, Arm's BF16) and FP32 products of the same operands give the same numbers but for the order of
sums. A processor without such units multiplies BF16 by converting as it goes, which takes torch
four times as long as its FP32 product: there the operands are widened in pieces that fit a cache,
and multiplied as FP32. That holds for baseline and fake-quantized linears, the output head,
attention and Hessians; no second copy of a weight is kept.

Of the libraries, MKL alone returns the FP32 sums of BF16 operands, which linears that are rounded
and Hessians need, and it uses units of Intel's processors alone: on others it takes as long as FP32
products do. There such linears are multiplied by a kernel of our own, Hessians as FP32.

The libraries that multiply can be told by environment variables what to use, and what they are told
counts more than what the processor has: a limit below BF16 makes it FP32, one that names BF16 units
leaves BF16 operands to the libraries. They read them when they are loaded, and so do we, once.
"""

import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numba
import torch

# Instruction sets with BF16 products, as each library names them in the variable that limits it.
# Sources: oneDNN's developer guide, "CPU dispatcher control"; MKL's, "instruction set specific
# dispatching".
LIMITS = {
    "ONEDNN_MAX_CPU_ISA": ("DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX",
                           "AVX512_CORE_AMX_FP16", "AVX10_1_512", "AVX10_1_512_AMX",
                           "AVX10_1_512_AMX_FP16", "AVX10_2", "AVX10_2_512",
                           "AVX10_2_512_AMX_2"),
    "MKL_ENABLE_INSTRUCTIONS": ("AVX512_E3", "AVX512_E4", "AVX512_E5"),
}  # fmt: skip

_X86_UNITS = ("avx512_bf16", "amx_bf16")
_NAMED = ("avx", "avx2", "fma3", "f16c", "avx512_f", "avx512_vnni", *_X86_UNITS)


@functools.cache
def features() -> tuple[str, ...]:
    """The processor's instruction sets that products depend on, whatever the libraries are told."""
    if platform.machine() in ("aarch64", "arm64"):
        units = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return ("neon", "bf16") if units else ("neon",)
    here = torch.cpu.get_capabilities()
    return tuple(name for name in _NAMED if here.get(name))


def bf16_units() -> bool:
    """Whether BF16 operands are multiplied as they are; otherwise as FP32."""
    return _by_libraries.get() or _chosen()


def by_vectors() -> bool:
    """Whether kernels of our own multiply BF16 by AVX512_BF16: where the processor has it, and
    neither the libraries nor Numba are told of another."""
    there = "avx512_bf16" in features() and numba.config.CPU_NAME is None
    return there and bf16_units()


def in_panels() -> bool:
    """Whether such a kernel (`dpq_core.kernels.bf16_panels`) takes the place of MKL's product. By
    what the processor has, not by its times, which differ from run to run: with AMX it is Intel's,
    and MKL uses that."""
    return by_vectors() and "amx_bf16" not in features()


def by_mkl() -> bool:
    """Whether FP32 sums of BF16 operands are MKL's."""
    return bf16_units() and not in_panels()


@contextmanager
def by_libraries() -> Iterator[None]:
    """Leave BF16 operands to torch, in this thread: for comparisons, to the last bit, with models
    whose products are torch's own."""
    token = _by_libraries.set(True)
    try:
        yield
    finally:
        _by_libraries.reset(token)


_by_libraries: ContextVar[bool] = ContextVar("by_libraries", default=False)


@functools.cache
def _chosen() -> bool:
    told = limits().items()
    if told:
        return all(value.upper() in LIMITS[name] for name, value in told)
    return not {"bf16", *_X86_UNITS}.isdisjoint(features())


def limits() -> dict[str, str]:
    """The variables that are set, of those which decide."""
    return {name: os.environ[name] for name in LIMITS if os.environ.get(name)}


def described() -> str:
    """For a run's record: the arithmetic, and why."""
    has = f"the processor has {', '.join(features()) or 'none of the vector units known here'}"
    told = "".join(f"; {name}={value}" for name, value in limits().items())
    return f"BF16 operands, {'BF16' if bf16_units() else 'FP32'} products ({has}{told})"
