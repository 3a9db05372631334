"""Gathering of the kept tokens: the extra tokens, then the selected patches."""

from __future__ import annotations

from typing import Any

import torch

from ._checks import check_device, check_dtype, check_extra_tokens, check_not_empty, check_shape
from ._layout import together
from ._registration import LIBRARY, define
from .backend import _C, launch


def reference(x: torch.Tensor, index: torch.Tensor, extra_tokens: int) -> torch.Tensor:
    """Define :func:`gather_tokens` in plain PyTorch."""
    kept = x[:, extra_tokens:].gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [B, keep, C]
    return torch.cat([x[:, :extra_tokens], kept], dim=1)  # [B, extra_tokens + keep, C]


def gather_tokens(x: torch.Tensor, index: torch.Tensor, extra_tokens: int) -> torch.Tensor:
    """Gather the extra tokens of each clip, then the patch tokens with the given numbers.

    Differentiable in ``x``.

    Args:
        x: Tokens ``[B, N, C]``, with any dtype and strides. The first ``extra_tokens`` of N are always kept.
        index: Patch numbers ``[B, keep]``, int64, from 0 to P - 1 where P = N - extra_tokens: extra tokens are not
            counted. ``keep`` is 1 to P. The numbers may have any order and may repeat.
        extra_tokens: Number of tokens before the patches, 0 to N - 1.

    Returns:
        Kept tokens ``[B, extra_tokens + keep, C]`` with the dtype of ``x``, contiguous.

    Raises:
        TypeError: ``index`` is not int64.
        ValueError: An argument has another shape, range or device.
        IndexError, RuntimeError: A patch number is out of range. On a GPU, where a check would have to wait for the
            device, the result is a device-side assertion or meaningless rows.
    """
    return _gather_tokens(x, index, extra_tokens)


def scatter_tokens(grad: torch.Tensor, index: torch.Tensor, extra_tokens: int, tokens: int) -> torch.Tensor:
    """Compute the gradient of ``x`` ``[B, tokens, C]`` from that of its kept rows ``[B, extra_tokens + keep, C]``."""
    batch, _, channels = grad.shape
    out = grad.new_zeros((batch, tokens, channels))  # [B, N, C]
    out[:, :extra_tokens] = grad[:, :extra_tokens]
    # Add, because a patch may have been gathered twice.
    rows = index.unsqueeze(-1).expand(-1, -1, channels)  # [B, keep, C]
    out[:, extra_tokens:].scatter_add_(1, rows, grad[:, extra_tokens:])
    return out


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """Return ``x`` ``[B, N, C]`` with contiguous rows, and its address, batch stride, token stride and row bytes."""
    x = together(x)
    size = x.element_size()
    return x, (x.data_ptr(), x.stride(0) * size, x.stride(1) * size, x.shape[2] * size)


def _check(x: torch.Tensor, index: torch.Tensor, extra_tokens: int) -> None:
    check_shape("x", x, "BNC")
    check_not_empty("x", x, "BNC")
    check_shape("index", index, ("B", "keep"))
    if index.shape[0] != x.shape[0]:
        raise ValueError(f"index: expected batch {x.shape[0]}, the batch of x, got {index.shape[0]}")
    check_dtype("index", index, (torch.int64,))
    check_device("index", index, "x", x)
    check_extra_tokens(extra_tokens, x.shape[1])
    if not 1 <= index.shape[1] <= x.shape[1] - extra_tokens:
        raise ValueError(
            f"index: expected 1 to {x.shape[1] - extra_tokens} patch numbers per clip, got {index.shape[1]}"
        )


def _fake(x: torch.Tensor, index: torch.Tensor, extra_tokens: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], extra_tokens + index.shape[1], x.shape[2]))


def _compiled(x: torch.Tensor, index: torch.Tensor, extra_tokens: int) -> torch.Tensor:
    batch, tokens, channels = x.shape
    keep = index.shape[1]
    if x.is_cuda and tokens - extra_tokens > _C.MAX_PATCHES:
        return reference(x, index, extra_tokens)
    index = index.contiguous()
    x, (source, batch_stride, token_stride, row) = rows_of(x)
    out = x.new_empty((batch, extra_tokens + keep, channels))
    rows = [(source, out.data_ptr(), batch_stride, token_stride, row)]
    launch("gather_tokens", x, index.data_ptr(), batch, tokens - extra_tokens, keep, extra_tokens, rows)
    return out


_gather_tokens = define(
    "gather_tokens(Tensor x, Tensor index, SymInt extra_tokens) -> Tensor",
    check=_check,
    fake=_fake,
    reference=reference,
    cpu=_compiled,
    cuda=_compiled,
)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, index, ctx.extra_tokens = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(index)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    return scatter_tokens(grad, index, ctx.extra_tokens, ctx.tokens), None, None


torch.library.register_autograd("pruneattn::gather_tokens", _backward, setup_context=_setup_context, lib=LIBRARY)
