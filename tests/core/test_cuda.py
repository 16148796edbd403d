"""Quantization's Triton kernels: run in the interpreter by `cuda_cases.py`, compiled for SM90."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_hopper import resources

from dpq_core import cuda

CASES = Path(__file__).with_name("cuda_cases.py")
POINTERS = {"group": "*i64"}
NUMBERS = {"rows": "i32", "columns": "i32", "maximum": "fp32", "mask": "i32", "lowest": "i32"}
ARRAYS = ("work", "codes", "factor", "group_scale", "zero_point", "channel_scale")


def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.parametrize("rounds", [True, False])
def test_it_compiles_for_hopper_without_a_device_and_spills_nothing(rounds, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**dict.fromkeys(ARRAYS, "*fp32"), **POINTERS, **NUMBERS}
    signature = {name: types.get(name, "constexpr") for name in cuda.choose.arg_names}
    constants = {"ROUNDS": rounds, "COLUMNS": 128, "PROGRAM_ROWS": cuda.ROWS}
    made = triton.compile(
        ASTSource(cuda.choose, signature, constants), target=GPUTarget("cuda", 90, 32)
    )
    registers, stack = resources(made.asm["cubin"], tmp_path)
    assert registers <= 255
    assert stack == 0
