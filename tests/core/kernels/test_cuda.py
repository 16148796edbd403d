"""Quantization's Triton kernels: run in the interpreter by `cuda_cases.py`, compiled for SM90."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_kernels import resources

from dpq_core.kernels import cuda

CASES = Path(__file__).with_name("cuda_cases.py")
WHOLE = ("rows", "columns", "features", "groups", "group_size", "mask", "lowest")
NUMBERS = {**dict.fromkeys(WHOLE, "i32"), "maximum": "fp32", "least_gain": "fp32", "group": "*i64"}
CONSTANTS = {"COLUMNS": 128, "CHUNK": 128, "PROGRAM_ROWS": cuda.ROWS}


def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("kernel", [cuda.choose, cuda.step, cuda.errors_of])
def test_it_compiles_for_hopper_without_a_device_and_spills_nothing(kernel, rounds, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"ROUNDS": rounds, **CONSTANTS}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    numbers = [name for name in kernel.arg_names if name not in constants]
    signature = {name: NUMBERS.get(name, "*fp32") for name in numbers}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    registers, stack = resources(made.asm["cubin"], tmp_path)
    assert registers <= 255
    assert stack == 0
