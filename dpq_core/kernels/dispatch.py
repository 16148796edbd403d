"""Which module's kernels take some tensors. Those of one name do what the definition does."""

from typing import Any

import torch
from torch import Tensor

from dpq_core.kernels import cpu


def kernels_for(*tensors: Tensor) -> Any:
    """`dpq_core.kernels.cpu` or `dpq_core.kernels.cuda`, for FP32 tensors on such a device; None:
    the definitions in plain torch run."""
    if cpu.fits(*tensors):
        return cpu
    if all(tensor.is_cuda and tensor.dtype == torch.float32 for tensor in tensors):
        from dpq_core.kernels import cuda  # Triton, which comes with a CUDA torch

        return cuda
    return None
