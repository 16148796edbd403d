"""The layer objective, tr((W - Ŵ) H (W - Ŵ)ᵀ): what quantization keeps low and its report says."""

import torch
from torch import Tensor

_ROWS = 128
_TINY = torch.finfo(torch.float32).tiny


def relative(lost: float, whole: float) -> float:
    """The objective of a residual as a share of the weight's own: the output's relative squared
    error. Zero where the layer's output is."""
    return lost / max(whole, _TINY)


def objective(residual: Tensor, hessian: Tensor) -> float:
    """tr(Dᵀ H D) of a transposed residual D [in, out], from one half of H, which is symmetric."""
    total = torch.zeros((), dtype=torch.float64, device=hessian.device)
    for start in range(0, len(hessian), _ROWS):
        rows, rest = slice(start, start + _ROWS), slice(start + _ROWS, None)
        product = hessian[rows, rows] @ residual[rows]
        product.addmm_(hessian[rows, rest], residual[rest], alpha=2)
        total += product.mul_(residual[rows]).sum(0).sum(dtype=torch.float64)
    return float(total)
