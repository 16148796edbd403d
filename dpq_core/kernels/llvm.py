"""What micro-kernels for CPUs are written with: LLVM's language, through llvmlite.

An address is an integer, as Numba's functions hand it over. Sources: llvmlite's `ir`; LLVM's
language reference.
"""

from collections.abc import Sequence
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils

Builder = Any

BIT, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()


class _BF16(ir.Type):  # llvmlite has none
    def __str__(self) -> str:
        return "bfloat"


BF16 = _BF16()


def fill(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def splat(b: Builder, value: Any, vector: ir.VectorType) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = b.insert_element(undefined, value, I32(0))
    return b.shuffle_vector(first, undefined, fill(ir.VectorType(I32, vector.count), 0))


def pick(b: Builder, low: Any, high: Any, lanes: Sequence[int]) -> Any:
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def call(b: Builder, name: str, returned: ir.Type, *arguments: Any) -> Any:
    kind = ir.FunctionType(returned, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}"), arguments)


def at(b: Builder, address: Any, offset: Any, kind: ir.Type) -> Any:
    """Pointer to `kind`, `offset` bytes (a number or a value) from an address."""
    offset = I64(offset) if isinstance(offset, int) else offset
    return b.inttoptr(b.add(address, offset), kind.as_pointer())


def load(b: Builder, address: Any, offset: Any, kind: ir.Type) -> Any:
    loaded = b.load(at(b, address, offset, kind))
    loaded.align = 1
    return loaded


def store(b: Builder, value: Any, address: Any, offset: Any) -> None:
    b.store(value, at(b, address, offset, value.type)).align = 1


class Rounding:
    """Rounding of vectors of FP32 to the grid of an 8-bit format (or BF16), by three numbers of
    `weights.steps`: adding and subtracting 1.5 · 2**n steps leaves FP32 no bits below a step."""

    def __init__(self, b: Builder, lanes: int, mask: Any, lowest: Any, steps: Any) -> None:
        self.integers, self.reals = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)
        self.mask, self.lowest, self.steps = (
            splat(b, value, self.integers) for value in (mask, lowest, steps)
        )

    def nearest(self, b: Builder, values: Any) -> Any:
        step = b.and_(b.bitcast(values, self.integers), self.mask)
        larger = f"smax.v{self.integers.count}i32"
        step = call(b, larger, self.integers, step, self.lowest)
        step = b.bitcast(b.add(step, self.steps), self.reals)
        return b.fsub(b.fadd(values, step), step)


def prefetch(b: Builder, address: Any, offset: int) -> None:
    """Have a line of the cache read before it is needed; beyond the end nothing happens."""
    reading, all_caches, data = I32(0), I32(3), I32(1)
    pointer = at(b, address, offset, I8)
    call(b, "prefetch.p0", ir.VoidType(), pointer, reading, all_caches, data)


def compiled(signature: Any, kernel: Any) -> Any:
    """A pointer that Numba's functions can call: who calls it does not compile it again."""
    function = numba.cfunc(signature)(kernel)
    pointer = function.ctypes
    pointer.function = function  # whose code goes with it
    return pointer
