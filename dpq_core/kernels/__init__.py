"""The operations that take the time: as plain torch defines them, and as a device computes them.

definitions    what is computed, to be read first
dispatch       chooses, by where the tensors are
cpu            Numba's loops (`numba_loops`), called with tensors
cuda           Triton's
products       how operands of BF16 are multiplied on this machine's CPU
forward_rows, sixteen_bit, attention   a model's linears and attention on such a CPU
blas, bf16_panels (in the language of llvm)   the products that these call
"""
