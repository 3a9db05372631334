"""What the kernels of attention share: tiles of rows, products, and how token counts that are no multiple of a tile end.

An audio transformer has one or two tokens more than a multiple of any tile (513 = 512 + 1). A tile for these would do an
eighth of the work once more, so the first one or two keys (or queries) are taken one by one, and tiles begin after them.
Only other counts pay for a last tile that is partly empty.
"""

import torch
import triton
import triton.language as tl

#: log2(e), since GPUs have an instruction for 2**x and none for e**x.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_MOST_APART = 2
# How float32 is multiplied. TF32 alone would be too coarse for a score; three of its products on tensor cores are what
# PyTorch's memory-efficient attention takes. AMD's compiler has plain float32.
_FLOAT32: tl.constexpr = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")


def split(count, block):
    """How a loop in tiles covers ``count``: rows taken one by one before the tiles, and whether a last tile is masked."""
    rest = count % block
    return (rest, False) if rest <= _MOST_APART else (0, True)


def last_rows(count, block):
    """Rows of the tile that a program of its own has for what ``count // block`` whole tiles leave: 0 if nothing."""
    rest = count % block
    return 0 if rest == 0 else min(16, block) if rest <= 16 else block


def tiled(count, block):
    """Rows of all tiles that share out ``count`` rows."""
    return count // block * block + last_rows(count, block)


def block_channels(channels):
    """Channels of a tile: a power of two, at least the 16 that a product needs."""
    return max(16, power_of_two(channels))


def power_of_two(count):
    """The next one that is not smaller. (Triton's takes 5 us a call, as does its cdiv.)"""
    return 1 << (count - 1).bit_length()


@triton.jit
def locate(count, heads, BLOCK: tl.constexpr):
    """Where a program works: its tile of the ``count`` rows, the number of its head among all clips', clip and head."""
    tiles = tl.cdiv(count, BLOCK)
    number = (tl.program_id(0) // tiles).to(tl.int64)
    return tl.program_id(0) % tiles, number, number // heads, number % heads


@triton.jit
def load_rows(base, first, count, stride, ROWS: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Rows from ``first`` on of a matrix ``[count, D]``: ``[ROWS, C]``, zeros outside of it."""
    row = first + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, C)[None, :]
    pointers = base + row * stride + channel  # [ROWS, C]
    if MASKED and D < C:
        return tl.load(pointers, mask=(row < count) & (channel < D), other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=row < count, other=0.0)
    elif D < C:
        return tl.load(pointers, mask=channel < D, other=0.0)
    return tl.load(pointers)


@triton.jit
def load_row(base, row, stride, D: tl.constexpr, C: tl.constexpr):
    """One row in float32: ``[1, C]``."""
    channel = tl.arange(0, C)[None, :]
    return tl.load(base + row * stride + channel, mask=channel < D, other=0.0).to(tl.float32)


@triton.jit
def store_rows(base, values, first, count, stride, ROWS: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Store ``values [ROWS, C]`` as rows from ``first`` on of a matrix ``[count, D]``, in its dtype."""
    row = first + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, C)[None, :]
    mask = (row < count) & (channel < D)
    tl.store(base + row * stride + channel, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b):
    """``a @ b`` summed in float32."""
    return tl.dot(a, b, input_precision=_FLOAT32)
