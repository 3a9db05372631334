"""Memory layout of the attention tensors, and conversions to the layouts that the kernels accept."""

from __future__ import annotations

import torch

#: Address of a ``[B, H, N, D]`` tensor, and its strides over clips, heads and tokens, in elements.
Place = tuple[int, int, int, int]


def together(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with a contiguous last dimension; the other strides may have any value."""
    return x if x.stride(-1) == 1 else x.contiguous()


def near(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` ``[B, H, N, D]`` with contiguous channels and row offsets that fit into Triton's 32-bit integers."""
    return x if x.stride(3) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def in_pieces(x: torch.Tensor) -> bool:
    """Return whether kernels can load ``x``, in half precision, in aligned pieces of 16 bytes."""
    *outer, last = x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in outer)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` ``[B, H, N, D]`` in half precision, or a copy if kernels cannot load it in pieces of 16 bytes."""
    return x if in_pieces(x) else x.clone(memory_format=torch.contiguous_format)


def heads_of(x: torch.Tensor) -> tuple[torch.Tensor, Place]:
    """Return ``x`` ``[B, H, N, D]`` with contiguous channels, and its :data:`Place`."""
    x = together(x)
    batch_stride, head_stride, token_stride, _ = x.stride()
    return x, (x.data_ptr(), batch_stride, head_stride, token_stride)


def rows_together(out: torch.Tensor) -> torch.Tensor:
    """Return ``out`` ``[B, H, M, D]`` stored as ``[B, M, H, D]``, the order in which the projection reads it."""
    return out.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
