"""How attention's tensors lie in memory, and how kernels want them."""

import torch


def together(x):
    """``x`` with a contiguous last dimension, for kernels that take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def near(x):
    """``x`` [B, H, N, D] with contiguous channels and rows no farther apart than Triton's 32-bit offsets reach."""
    return x if x.stride(3) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def in_pieces(x):
    """Whether pieces of 16 bytes of half precision can be loaded from anywhere in ``x``."""
    *outer, last = x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in outer)


def aligned(x):
    """``x`` [B, H, N, D] of half precision, copied if kernels that load 16 bytes at a time do not take it as it lies."""
    return x if in_pieces(x) else x.clone(memory_format=torch.contiguous_format)


def heads_of(x):
    """``x`` [B, H, N, D] with contiguous channels, and where a kernel finds them: pointer and strides in elements."""
    x = together(x)
    return x, (x.data_ptr(), *x.stride()[:3])


def rows_together(out):
    """``[B, H, M, D]`` stored as ``[B, M, H, D]``: the projection reads the heads of a token one after the other."""
    return out.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
