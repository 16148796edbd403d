"""The fused pass of many tokens through a linear; its numbers are `test_linear`'s."""

import pytest
import torch

from dpq_core.kernels import blas, forward_rows, products


@pytest.mark.skipif(blas.bf16_product is None, reason="this torch comes without MKL")
def test_one_kernel_is_compiled_whatever_a_linear_has():
    """For the layout of channel scales that are one, another was: a second of each process."""
    x, weight = torch.ones(70, 80).bfloat16(), torch.ones(48, 80).bfloat16()
    kernel = forward_rows._by_units if products.bf16_units() else forward_rows._as_fp32
    forward_rows.forward(x, weight, None)
    before = list(kernel.signatures)
    every_second = torch.ones(96)[::2]
    forward_rows.forward(x, weight, every_second, every_second, torch.ones(70, 1))
    assert kernel.signatures == before
