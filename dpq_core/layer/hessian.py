"""What calibration leaves of a layer's inputs: their second moment and their magnitudes.

    H = mean over tokens of 2 x xᵀ     [in, in] fp32, kept as a sum and a token count

The layer objective tr((W - Ŵ) H (W - Ŵ)ᵀ) is the mean squared error of the layer's output, doubled.
Magnitudes are counted per BF16 value: |x| in BF16 has 2**15 bit patterns, so the histogram is
exact, mergeable, and every range estimator can be computed from it afterwards.

Linears that read the same input (q, k, v; gate, up) share one `InputStatistics`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpq_core.kernels import cpu
from dpq_core.kernels.definitions import MAGNITUDES
from dpq_core.kernels.dispatch import count_magnitudes


@dataclass
class InputStatistics:
    """Statistics of one linear's (or several linears' shared) input. Mergeable."""

    hessian_sum: Tensor  # [in, in] fp32, sum over tokens of 2 x xᵀ
    tokens: int
    magnitudes: Tensor  # [2**15] int64, occurrences of each |x| as bf16 bits

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> "InputStatistics":
        return cls(
            torch.zeros(features, features, dtype=torch.float32, device=device),
            0,
            torch.zeros(MAGNITUDES, dtype=torch.int64, device=device),
        )

    def add_hessian(self, x: Tensor, scale: Tensor | None = None) -> None:
        """Count inputs `x` [..., in], any float type, in units of `scale` (a scalar), into the sum.

        BF16 and 8-bit values have products that FP32 holds exactly: how they are multiplied
        (`dpq_core.kernels.products`) decides on the order of the sums, which are FP32 in any case.
        """
        rows = x.reshape(-1, x.shape[-1])
        factor = 2.0 if scale is None else 2 * float(scale) ** 2
        if rows.is_cpu:
            cpu.add_square(self.hessian_sum, rows, factor)
        elif rows.is_cuda:
            self.hessian_sum.add_(_square_on_tensor_cores(rows), alpha=factor)
        else:
            rows = rows.float()
            self.hessian_sum.addmm_(rows.T, rows, alpha=factor)
        self.tokens += len(rows)

    def add_magnitudes(self, x: Tensor) -> None:
        """Count |x| of any shape, rounded to BF16."""
        self.magnitudes += count_magnitudes(x)

    def add(self, other: "InputStatistics") -> None:
        """Count the other's tokens too."""
        if self.hessian_sum.shape != other.hessian_sum.shape:
            raise ValueError(
                f"statistics of {self.hessian_sum.shape[0]} and {other.hessian_sum.shape[0]} "
                "features do not add: they are of different inputs"
            )
        self.hessian_sum += other.hessian_sum
        self.tokens += other.tokens
        self.magnitudes += other.magnitudes

    def hessian(self) -> Tensor:
        """H [in, in] fp32.

        Raises:
            ValueError: no token was counted, or the sum is not finite.
        """
        if self.tokens == 0:
            raise ValueError("the layer saw no calibration token")
        mean = self.hessian_sum / self.tokens
        if not torch.isfinite(mean.sum()):
            raise ValueError("the calibration inputs of the layer are not finite")
        return mean

    def to(self, device: torch.device | str) -> "InputStatistics":
        """The same statistics on a device."""
        return InputStatistics(self.hessian_sum.to(device), self.tokens, self.magnitudes.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """For storage; `from_tensors` is the inverse."""
        return {
            "hessian_sum": self.hessian_sum,
            "tokens": torch.tensor(self.tokens, dtype=torch.int64),
            "magnitudes": self.magnitudes,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "InputStatistics":
        return cls(tensors["hessian_sum"], int(tensors["tokens"]), tensors["magnitudes"])


def _square_on_tensor_cores(x: Tensor) -> Tensor:
    """xᵀ x [n, n] fp32 of x [rows, n] on CUDA: BF16 operands, FP32 sums.

    An FP32 x is the sum of two BF16 numbers, h + l, to 16 bits: hᵀh + hᵀl + lᵀh, a tenth of the
    time of an FP32 product; lᵀl lies below what FP32 sums of so many tokens hold.
    """
    high = x.to(torch.bfloat16)
    square = torch.mm(high.T, high, out_dtype=torch.float32)
    if x.dtype != torch.bfloat16:
        low = (x.float() - high.float()).to(torch.bfloat16)
        cross = torch.mm(high.T, low, out_dtype=torch.float32)
        square += cross + cross.T
    return square
