"""The matrix products of the MKL that comes with torch, for kernels that call them themselves.

Torch's own operators multiply BF16 into BF16 only; `cblas_gemm_bf16bf16f32` returns its FP32 sums.
Each is None where this torch does not export it: the definitions in plain torch run instead. Called
from several threads at once, each call runs in its own.
"""

import ctypes
from typing import Any

import torch

ROW_MAJOR, AS_IS, TRANSPOSED = 101, 111, 112  # cblas.h
_LIBRARY = ctypes.CDLL(torch._C.__file__)
_int, _float, _address = ctypes.c_int, ctypes.c_float, ctypes.c_int64

bf16_product: Any = getattr(_LIBRARY, "cblas_gemm_bf16bf16f32", None)
if bf16_product is not None:
    bf16_product.restype = None
    bf16_product.argtypes = [
        *[_int] * 6,  # layout, transpositions of A and B, rows, columns, summands
        *[_float, _address, _int, _address, _int],  # alpha, A and its stride, B and its stride
        *[_float, _address, _int],  # beta, C and its stride
    ]

# FP32, by Fortran's interface: column-major, and each argument is an address.
sgemm: Any = getattr(_LIBRARY, "sgemm_", None)
if sgemm is not None:
    sgemm.restype = None
    sgemm.argtypes = [_address] * 13
