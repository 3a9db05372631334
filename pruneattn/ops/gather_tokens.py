"""Gathering of the kept tokens: the extra tokens, then the selected patches."""

import torch

from ._checks import check_device, check_dtype, check_extra_tokens, check_not_empty, check_shape
from ._layout import together
from ._registration import LIBRARY, define
from .backend import _C, launch


def reference(x, index, extra_tokens):
    """The definition of :func:`gather_tokens` in plain PyTorch."""
    kept = x[:, extra_tokens:].gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [B, keep, C]
    return torch.cat([x[:, :extra_tokens], kept], dim=1)  # [B, extra_tokens + keep, C]


def gather_tokens(x, index, extra_tokens):
    """The extra tokens of each clip, then its patch tokens of these numbers. Differentiable in ``x``.

    Args:
        x: tokens ``[B, N, C]``, any dtype, any strides; the first ``extra_tokens`` of N are always kept.
        index: int64 ``[B, keep]``, patch numbers 0 to P - 1 where P = N - extra_tokens: extra tokens are not counted.
            ``keep`` is 1 to P; any order, a number may repeat.
        extra_tokens: how many tokens at the front are not patches, 0 to N - 1.

    Returns:
        ``[B, extra_tokens + keep, C]``, dtype of ``x``, contiguous.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than said here.
        IndexError, RuntimeError: a patch number is out of range. On a GPU, where looking would cost a wait, it is
            either a device-side assertion or rows without meaning.
    """
    return _gather_tokens(x, index, extra_tokens)


def scatter_tokens(grad, index, extra_tokens, tokens):
    """The transpose of the gather: rows go back to where they came from, the rest of ``tokens`` rows is zero."""
    batch, _, channels = grad.shape
    out = grad.new_zeros((batch, tokens, channels))  # [B, N, C]
    out[:, :extra_tokens] = grad[:, :extra_tokens]
    # Adds, for a patch may have been gathered twice.
    rows = index.unsqueeze(-1).expand(-1, -1, channels)  # [B, keep, C]
    out[:, extra_tokens:].scatter_add_(1, rows, grad[:, extra_tokens:])
    return out


def rows_of(x):
    """``x`` [B, N, C] with contiguous rows, and where a kernel finds them: pointer, strides and row size in bytes."""
    x = together(x)
    size = x.element_size()
    return x, (x.data_ptr(), x.stride(0) * size, x.stride(1) * size, x.shape[2] * size)


def _check(x, index, extra_tokens):
    check_shape("x", x, "BNC")
    check_not_empty("x", x, "BNC")
    check_shape("index", index, ("B", "keep"))
    if index.shape[0] != x.shape[0]:
        raise ValueError(f"index: expected batch {x.shape[0]}, the batch of x, got {index.shape[0]}")
    check_dtype("index", index, (torch.int64,))
    check_device("index", index, "x", x)
    check_extra_tokens(extra_tokens, x.shape[1])
    if not 1 <= index.shape[1] <= x.shape[1] - extra_tokens:
        raise ValueError(f"index: expected 1 to {x.shape[1] - extra_tokens} patch numbers a clip, got {index.shape[1]}")


def _fake(x, index, extra_tokens):
    return x.new_empty((x.shape[0], extra_tokens + index.shape[1], x.shape[2]))


def _compiled(x, index, extra_tokens):
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


def _setup_context(ctx, inputs, output):
    x, index, ctx.extra_tokens = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(index)


def _backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return scatter_tokens(grad, index, ctx.extra_tokens, ctx.tokens), None, None


torch.library.register_autograd("pruneattn::gather_tokens", _backward, setup_context=_setup_context, lib=LIBRARY)
