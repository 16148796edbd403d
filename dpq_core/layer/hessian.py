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

from dpq_core.arithmetic.formats import NumberFormat, round_to
from dpq_core.kernels import cpu

MAGNITUDES = 1 << 15  # bit patterns of a non-negative bf16


@dataclass
class InputStatistics:
    """Statistics of one linear's (or several linears' shared) input. Mergeable."""

    hessian_sum: Tensor  # [in, in] fp32, sum over tokens of 2 x xᵀ
    tokens: int
    magnitudes: Tensor  # [2**15] int64, occurrences of each |x| as bf16 bits
    shift_sum: Tensor | None = None  # [in, in] fp32, sum over tokens of 2 (x16 - x) xᵀ

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
        hessian, magnitudes = self.hessian_sum.to(device), self.magnitudes.to(device)
        return InputStatistics(hessian, self.tokens, magnitudes, shift)

    def tensors(self) -> dict[str, Tensor]:
        """For storage; `from_tensors` is the inverse."""
        stored = {
            "hessian_sum": self.hessian_sum,
            "tokens": torch.tensor(self.tokens, dtype=torch.int64),
            "magnitudes": self.magnitudes,
        }
        return stored if self.shift_sum is None else stored | {"shift_sum": self.shift_sum}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "InputStatistics":
        tokens, shift = int(tensors["tokens"]), tensors.get("shift_sum")
        return cls(tensors["hessian_sum"], tokens, tensors["magnitudes"], shift)


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


def raise_first(x: Tensor, share: float) -> Tensor:
    """Windows' inputs [windows, length, in] of any float type, each window's first token times the
    root that makes it count as `share` of its window in H; the others are equal. x's type.

    The first token is where attention goes that has nowhere else to go (Xiao et al., "Efficient
    Streaming Language Models with Attention Sinks", 2024): an error of its value is in all tokens'
    outputs, and H has it as one token of hundreds. It is one direction, which costs the others
    little.
    """
    raised = x.clone()
    raised[:, 0] = (x[:, 0].float() * first_root(share, x.shape[1])).to(x.dtype)
    return raised


def first_root(share: float, length: int) -> float:
    """What `raise_first` multiplies the first of `length` tokens with."""
    return float((share / (1 - share) * (length - 1)) ** 0.5)


def equal_norms(x: Tensor) -> Tensor:
    """Inputs [..., in] of any float type, each token's divided by its norm; zeros stay. x's type.

    So every token has the same say in H, whose objective is then the mean over tokens of
    ‖ΔW x‖² / ‖x‖². As they are, an attention sink's inputs are too large or too small: before
    SmolLM2-135M's `down_proj` of layer 11 they have 500 times the median norm and 99.8 % of H, and
    before its `v_proj` 0.3 to 0.5 times, although every token reads what becomes of them
    (`docs/log.md`).
    """
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x.float() / norms.clamp(min=torch.finfo(torch.float32).tiny)).to(x.dtype)


def count_magnitudes(x: Tensor) -> Tensor:
    """Occurrences [2**15] int64 of each |x|, of any shape, rounded to BF16."""
    if x.is_cpu and x.dtype == torch.bfloat16:
        counts = torch.zeros(MAGNITUDES, dtype=torch.int64)
        cpu.count_magnitudes(x, counts)
        return counts
    if x.is_cuda:
        from dpq_core.kernels import cuda  # Triton, which comes with a CUDA torch

        return cuda.count_magnitudes(x.to(torch.bfloat16), MAGNITUDES)
    bits = x.to(torch.bfloat16).view(torch.int16).flatten().int() & (MAGNITUDES - 1)
    return torch.bincount(bits, minlength=MAGNITUDES)


def static_input_scale(magnitudes: Tensor, fmt: NumberFormat, estimator: str) -> Tensor:
    """One scale for all of a layer's activations, from their histogram. FP32 scalar.

    Args:
        magnitudes: [2**15] int64, as counted by `InputStatistics`.
        fmt: 8-bit format of the activations.
        estimator: `amax`, the largest magnitude meets the format's maximum; `percentile`, 99.9 % of
            the values lie within it; `mse`, the least squared error among shrunk ranges.
    """
    values = torch.arange(MAGNITUDES, dtype=torch.int16).view(torch.bfloat16).float()
    present = magnitudes.cpu().nonzero().flatten()
    if len(present) == 0 or not torch.isfinite(values[present[-1]]):
        raise ValueError("no finite calibration activations to choose a static scale from")
    values, counts = values[present], magnitudes.cpu()[present].double()
    amax = values[-1]
    if amax == 0:
        return torch.ones((), dtype=torch.float32)
    if estimator == "percentile":
        cumulative = counts.cumsum(0) / counts.sum()
        amax = values[int(torch.searchsorted(cumulative, _PERCENTILE))]
        amax = amax if amax > 0 else values[-1]
    elif estimator == "mse":
        ranges = [values[-1] * share for share in _RANGE_SHARES]
        errors = [_rounding_error(values, counts, top / fmt.maximum, fmt) for top in ranges]
        amax = ranges[errors.index(min(errors))]
    return amax / fmt.maximum


_PERCENTILE = 0.999
_RANGE_SHARES = tuple(2 ** (-step / 8) for step in range(48))


def _rounding_error(values: Tensor, counts: Tensor, scale: Tensor, fmt: NumberFormat) -> float:
    residual = round_to(values / scale, fmt) * scale - values
    return float((residual.double().square() * counts).sum())
