"""Support for bfloat16 in Triton's interpreter: rounding to nearest, and products (it multiplies the bits)."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _rounding_cast(self, src, dst_type):
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        bits = src.data.astype(np.float32).view(np.uint32)
        rounded = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000  # to nearest, ties to even
        src = TensorHandle(
            np.where(np.isfinite(src.data), rounded, bits).astype(np.uint32).view(np.float32), tl.float32
        )
    return _cast(self, src, dst_type)


def _widening_dot(self, a, b, *rest):
    a, b = (_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, *rest)


def mend():
    """Patch Triton's interpreter in this process."""
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = _rounding_cast, _widening_dot
