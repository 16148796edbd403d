"""One input's Hessian, as all layers that read it use it: mean, ordered and factorised once.

q, k and v, or gate and up, read the same input. Under one scheme they take the same order π and the
same factor of H⁻¹, n³ operations, which are kept from one layer to the next; a layer with another
order has the Hessian put into that one. A permutation moves numbers and changes none, so a layer
has the same bytes alone and after others. Where layers are corrected, what these inputs tell of the
16-bit model's is found once too.

Memory: the Hessian, and its factor once a layer has asked for one; with a correction S and M.
"""

import torch
from torch import Tensor

from dpq_core.layer.column_loop import inverse_factor
from dpq_core.layer.correction import recovery
from dpq_core.layer.hessian import InputStatistics


class SharedInput:
    """Made of statistics [in, in], on their device. They are let go when the Hessian is first asked
    for: a caller that needs the memory then keeps no reference to them."""

    def __init__(self, statistics: InputStatistics) -> None:
        self._statistics: InputStatistics | None = statistics
        self.tokens = statistics.tokens
        self.features = len(statistics.hessian_sum)
        self.magnitudes = statistics.magnitudes  # [2**15] int64
        self.unseen = statistics.unseen  # [tokens, in] bf16, or None
        self._hessian: Tensor | None = None  # [in, in] fp32, in the order `_order`
        self._order: Tensor | None = None  # π [in] int64; None: as stored
        self._factor: tuple[float, Tensor, float] | None = None  # asked damping, U, taken damping
        self._shift_sum = statistics.shift_sum  # [in, in] fp32
        self._recovery: tuple[float, Tensor, float] | None = None  # asked damping, M, taken damping

    def hessian(self, order: Tensor | None = None) -> Tensor:
        """H [in, in] fp32 in the order π; without one, as its columns are stored. Not to be
        changed.

        Raises:
            ValueError: no token was counted, or the sum is not finite.
        """
        if self._hessian is None:
            assert self._statistics is not None
            self._hessian, self._statistics = self._statistics.hessian(), None
        if not _same(self._order, order):
            self._factor = None
            if self._order is not None:
                self._hessian = _permuted(self._hessian, self._order.argsort())
            if order is not None:
                self._hessian = _permuted(self._hessian, order)
            self._order = order
        return self._hessian

    def diagonal(self) -> Tensor:
        """diag(H) [in] fp32, as its columns are stored."""
        hessian = self._hessian if self._order is not None else self.hessian()
        assert hessian is not None
        found = hessian.diagonal().clone()  # of its own memory: the Hessian moves on
        return found if self._order is None else found.index_select(0, self._order.argsort())

    def factor(self, order: Tensor, damp_frac: float) -> tuple[Tensor, float]:
        """`column_loop.inverse_factor` of H in the order π. Not to be changed.

        Raises:
            FactorizationError: as there.
        """
        hessian = self.hessian(order)
        if self._factor is None or self._factor[0] != damp_frac:
            self._factor = None  # before the next is made
            self._factor = (damp_frac, *inverse_factor(hessian, damp_frac))
        return self._factor[1:]

    def recovery(self, damp_frac: float) -> tuple[Tensor, float]:
        """M [in, in] fp32 of `dpq_core.layer.correction`, its columns as stored, and the damping
        that it took. Not to be changed. To be asked for first: it takes a factor of its own.

        Raises:
            FactorizationError: as `factor`.
            ValueError: calibration did not see the 16-bit model's inputs, or they are not finite.
        """
        if self._recovery is None or self._recovery[0] != damp_frac:
            if self._shift_sum is None:
                raise ValueError("calibration did not see what the 16-bit model gives the layer")
            factor, damping = inverse_factor(self.hessian(), damp_frac)
            found = recovery(self._shift_sum, factor).div_(self.tokens)
            if not torch.isfinite(found.sum()):
                raise ValueError("what the 16-bit model gives the layer is not finite")
            self._recovery = damp_frac, found, damping
        return self._recovery[1:]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns [n, n] in an order."""
    return matrix.index_select(0, order).index_select(1, order)
