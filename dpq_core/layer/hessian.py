"""What calibration leaves of a layer's inputs: their second moment and their magnitudes.

    H = mean over tokens of 2 x xᵀ              [in, in] fp32, kept as a sum and a token count
    S = mean over tokens of 2 (x16 - x) xᵀ      the same, where layers are corrected: x16 is what
                                                the 16-bit model gives the layer in place of x

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
from dpq_core.layer.kv_cache import CacheMaxima


@dataclass
class InputStatistics:
    """Statistics of one linear's (or several linears' shared) input. Mergeable."""

    hessian_sum: Tensor  # [in, in] fp32, sum over tokens of 2 x xᵀ
    tokens: int
    magnitudes: Tensor  # [2**15] int64, occurrences of each |x| as bf16 bits
    shift_sum: Tensor | None = None  # [in, in] fp32, sum over tokens of 2 (x16 - x) xᵀ
    cache: CacheMaxima | None = None  # of the attention that makes these inputs, where asked for
    unseen: Tensor | None = None  # [others, in] bf16, inputs of tokens that are in no sum

    @classmethod
    def empty(
        cls, features: int, device: torch.device | str = "cpu", shifted: bool = False
    ) -> "InputStatistics":
        """shifted: with S."""
        square = torch.zeros(features, features, dtype=torch.float32, device=device)
        return cls(
            square,
            0,
            torch.zeros(MAGNITUDES, dtype=torch.int64, device=device),
            square.clone() if shifted else None,
        )

    @classmethod
    def even(cls, features: int, device: torch.device | str = "cpu") -> "InputStatistics":
        """H is the identity, all columns count alike: of an embedding, whose rows are looked up."""
        found = cls.empty(features, device)
        found.hessian_sum.fill_diagonal_(1.0)
        found.tokens = 1
        return found

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

    def add_shift(self, away: Tensor, x: Tensor, scale: Tensor | None = None) -> None:
        """Count how far the 16-bit model's inputs are `away` [tokens, in] fp32 from `x` [tokens,
        in], which is in units of `scale` as in `add_hessian`. Multiplied in BF16 where x is."""
        assert self.shift_sum is not None
        factor = 2.0 if scale is None else 2 * float(scale)
        narrow = x.dtype == torch.bfloat16
        left, right = (away.bfloat16(), x) if narrow else (away, x.float())
        if x.is_cpu:
            cpu.add_product(self.shift_sum, left, right, factor)
        elif x.is_cuda and narrow:
            product = torch.mm(left.T, right, out_dtype=torch.float32)
            self.shift_sum.add_(product, alpha=factor)
        else:
            self.shift_sum.addmm_(left.float().T, right.float(), alpha=factor)

    def add_magnitudes(self, x: Tensor) -> None:
        """Count |x| of any shape, rounded to BF16."""
        self.magnitudes += count_magnitudes(x)

    def add_unseen(self, x: Tensor, scale: Tensor | None = None) -> None:
        """Keep inputs as `add_hessian` takes them, of tokens that it is not given."""
        rows = x.reshape(-1, x.shape[-1]).float() * (1 if scale is None else scale)
        self._keep(rows.bfloat16())

    def _keep(self, rows: Tensor) -> None:
        self.unseen = rows if self.unseen is None else torch.cat([self.unseen, rows])

    def add(self, other: "InputStatistics") -> None:
        """Count the other's tokens too."""
        if self.hessian_sum.shape != other.hessian_sum.shape:
            raise ValueError(
                f"statistics of {self.hessian_sum.shape[0]} and {other.hessian_sum.shape[0]} "
                "features do not add: they are of different inputs"
            )
        self.hessian_sum += other.hessian_sum
        if self.shift_sum is not None:
            assert other.shift_sum is not None
            self.shift_sum += other.shift_sum
        if self.cache is not None:
            assert other.cache is not None
            self.cache.add(other.cache)
        if other.unseen is not None:
            self._keep(other.unseen)
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
        shift = None if self.shift_sum is None else self.shift_sum.to(device)
        unseen = None if self.unseen is None else self.unseen.to(device)
        hessian, magnitudes = self.hessian_sum.to(device), self.magnitudes.to(device)
        return InputStatistics(hessian, self.tokens, magnitudes, shift, self.cache, unseen)

    def tensors(self) -> dict[str, Tensor]:
        """For storage; `from_tensors` is the inverse."""
        stored = {
            "hessian_sum": self.hessian_sum,
            "tokens": torch.tensor(self.tokens, dtype=torch.int64),
            "magnitudes": self.magnitudes,
        }
        if self.shift_sum is not None:
            stored["shift_sum"] = self.shift_sum
        if self.unseen is not None:
            stored["unseen"] = self.unseen
        return stored if self.cache is None else stored | self.cache.tensors()

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "InputStatistics":
        tokens, shift = int(tensors["tokens"]), tensors.get("shift_sum")
        cache = CacheMaxima.from_tensors(tensors)
        unseen = tensors.get("unseen")
        return cls(tensors["hessian_sum"], tokens, tensors["magnitudes"], shift, cache, unseen)


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
