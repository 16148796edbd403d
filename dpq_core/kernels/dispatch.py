"""Which device's kernels take some tensors. Those of one name compute what the definition does."""

from typing import Any

import torch
from torch import Tensor

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.kernels import cpu, definitions
from dpq_core.kernels.definitions import MAGNITUDES


def kernels_for(*tensors: Tensor) -> Any:
    """`cpu` or `cuda` for FP32 tensors on such a device, else `definitions`: a module with
    `choose_block`, `step_columns` (`cpu` has all passes as one, `refine_codes`), `group_errors`."""
    if cpu.fits(*tensors):
        return cpu
    if all(tensor.is_cuda and tensor.dtype == torch.float32 for tensor in tensors):
        from dpq_core.kernels import cuda  # Triton, which comes with a CUDA torch

        return cuda
    return definitions


def residual(
    codes: Tensor,  # [in, out] fp32
    weight: Tensor,  # [in, out] fp32, used up
    grid: ColumnGrid,
) -> Tensor:
    """ŵ - w [in, out], in the place of w."""
    if cpu.fits(codes, weight):
        return cpu.residual(codes, weight, grid)
    return definitions.residual(codes, weight, grid)


def count_magnitudes(x: Tensor) -> Tensor:
    """Occurrences [2**15] int64 of each |x|, of any shape, rounded to BF16."""
    if x.is_cpu and x.dtype == torch.bfloat16:
        counts = torch.zeros(MAGNITUDES, dtype=torch.int64)
        cpu.count_magnitudes(x, counts)
        return counts
    if x.is_cuda:
        from dpq_core.kernels import cuda

        return cuda.count_magnitudes(x.to(torch.bfloat16), MAGNITUDES)
    return definitions.count_magnitudes(x)


def compare(sums: Tensor, best: Tensor, offset: int, a: Tensor, b: Tensor) -> None:
    """`definitions.compare`."""
    of_device = cpu if cpu.fits(a, b) else definitions
    of_device.compare(sums, best, offset, a, b)
