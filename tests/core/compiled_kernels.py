"""What the tools that come with Triton say of kernels compiled for a GPU that is not there."""

import re
import subprocess
from pathlib import Path


def by_tool(name, cubin, folder, *options):
    """What a tool that comes with Triton says of a compiled kernel."""
    import triton

    (file := folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *options, file], capture_output=True, text=True, check=True).stdout


def resources(cubin, folder):
    """Registers and stack bytes of a thread."""
    said = by_tool("cuobjdump", cubin, folder, "-res-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)
