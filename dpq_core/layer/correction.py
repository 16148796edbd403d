"""What is quantized in place of a weight: what comes nearest to the 16-bit model's outputs.

A layer of a quantized model reads x, made by what was quantized before it, where the 16-bit model's
reads x16. With the second moments that calibration sums over tokens (`dpq_core.layer.hessian`),

    H = mean 2 x xᵀ,    S = mean 2 (x16 - x) xᵀ,    M = S (H + λ)⁻¹

x + M x is the least squares estimate of x16 from x, and W (I + M) the weight W' of least

    mean 2 ‖W x16 - W' x‖² + λ ‖W' - W‖²

λ is the damping of the Hessian, as the column loop has it. What is quantized is

    W + c W M       c: `calibration.correction`

Sources: asymmetric calibration of GPTAQ (Li et al., 2025, arXiv 2504.02692), which adds the shift
inside the column loop; solved for before it, as here, in Qronos (2505.11695). The share c is ours:
M is fitted to the calibration tokens, and half of it does better on other texts than all of it
(`docs/results.md`).
"""

import torch
from torch import Tensor

_ROWS = 1024  # of S that are multiplied at a time


def recovery(shift: Tensor, factor: Tensor) -> Tensor:
    """M [in, in] fp32, what a layer's inputs tell of what they lack of the 16-bit model's; of a
    multiple of S the same multiple.

    Args:
        shift: S [in, in] fp32.
        factor: U [in, in] fp32, of (H + λ)⁻¹ = Uᵀ U, as `column_loop.inverse_factor` gives it.
    """
    found = torch.empty_like(shift)
    for rows, into in zip(shift.split(_ROWS), found.split(_ROWS), strict=True):
        torch.mm(rows @ factor.T, factor, out=into)
    return found
