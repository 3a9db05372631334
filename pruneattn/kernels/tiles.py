"""Shared by the attention kernels: tiles of rows, products, and token counts that are not a multiple of a tile.

An audio transformer has one or two more tokens than a multiple of any tile (513 = 512 + 1). A tile for these tokens
would add an eighth to the work, so the kernels process the first one or two keys (or queries) one by one, and tiles
begin after them. Only other counts need a last tile that is partly empty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: log2(e): GPUs have an instruction for 2**x but none for e**x.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_MOST_APART = 2
# Precision of float32 products. TF32 would be too coarse for scores. Like PyTorch's memory-efficient attention, the
# kernels use three TF32 products on tensor cores. AMD's compiler supports plain float32.
_FLOAT32: tl.constexpr = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")


def split(count: int, block: int) -> tuple[int, bool]:
    """Return the number of ``count`` rows before the tiles of a loop, and whether its last tile is masked."""
    rest = count % block
    return (rest, False) if rest <= _MOST_APART else (0, True)


def last_rows(count: int, block: int) -> int:
    """Return the rows of the smaller tile for the remainder of ``count`` rows, or 0 if whole tiles cover them."""
    rest = count % block
    return 0 if rest == 0 else min(16, block) if rest <= 16 else block


def tiled(count: int, block: int) -> int:
    """Return the number of rows in all tiles that cover ``count`` rows."""
    return count // block * block + last_rows(count, block)


def block_channels(channels: int) -> int:
    """Return the channels of a tile: a power of two, at least the 16 that a product needs."""
    return max(16, power_of_two(channels))


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least ``count``."""
    # Triton's next_power_of_2 takes 5 us per call, as does its cdiv.
    return 1 << (count - 1).bit_length()


@triton.jit
def locate(count, heads, BLOCK: tl.constexpr):
    """Return a program's tile of the ``count`` rows, the number of its head in the batch, its clip and its head."""
    tiles = tl.cdiv(count, BLOCK)
    number = (tl.program_id(0) // tiles).to(tl.int64)
    return tl.program_id(0) % tiles, number, number // heads, number % heads


@triton.jit
def load_rows(base, first, count, stride, ROWS: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Load rows ``[ROWS, C]`` from ``first`` on of a matrix ``[count, D]``, with zeros outside of it."""
    row = first + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, C)[None, :]
    pointers = base + row * stride + channel  # [ROWS, C]
    if MASKED and D < C:
        return tl.load(pointers, mask=(row < count) & (channel < D), other=0.0)
    if MASKED:
        return tl.load(pointers, mask=row < count, other=0.0)
    if D < C:
        return tl.load(pointers, mask=channel < D, other=0.0)
    return tl.load(pointers)


@triton.jit
def load_row(base, row, stride, D: tl.constexpr, C: tl.constexpr):
    """Load one row ``[1, C]`` in float32."""
    channel = tl.arange(0, C)[None, :]
    return tl.load(base + row * stride + channel, mask=channel < D, other=0.0).to(tl.float32)


@triton.jit
def store_rows(base, values, first, count, stride, ROWS: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Store ``values`` ``[ROWS, C]`` as the rows from ``first`` on of a matrix ``[count, D]``, in its dtype."""
    row = first + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, C)[None, :]
    mask = (row < count) & (channel < D)
    tl.store(base + row * stride + channel, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b):
    """Return ``a @ b``, accumulated in float32."""
    return tl.dot(a, b, input_precision=_FLOAT32)
