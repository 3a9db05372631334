"""Selection and gathering of two tensors at once: one launch instead of three."""

import torch

from ..backend import _C, launch
from ._checks import check_device, check_extra_tokens, check_shape
from .gather_tokens import reference as gather_reference
from .gather_tokens import rows_of, scatter_tokens
from ._registration import LIBRARY, define
from .select_tokens import check_selection
from .select_tokens import reference as select_reference


def reference(scores, x, y, keep, extra_tokens):
    """The definition of :func:`prune_tokens` in plain PyTorch."""
    index = select_reference(scores, keep)
    return index, gather_reference(x, index, extra_tokens), gather_reference(y, index, extra_tokens)


def prune_tokens(scores, x, y, keep, extra_tokens):
    """``select_tokens(scores, keep)``, and ``gather_tokens`` of ``x`` and of ``y`` with it, fused.

    Two tensors, because a pruned block needs the same rows of the residual stream and of the attention output.
    Differentiable in ``x`` and ``y``; not in ``scores``.

    Args:
        scores: float32 ``[B, P]``, any strides.
        x: tokens ``[B, N, C]`` with N = extra_tokens + P, any dtype, any strides.
        y: tokens ``[B, N, C']``, any dtype, any strides.
        keep: how many patches to keep, 1 to P.
        extra_tokens: how many tokens at the front are not patches.

    Returns:
        index: int64 ``[B, keep]``, ascending patch numbers.
        x_kept: ``[B, extra_tokens + keep, C]``, contiguous.
        y_kept: ``[B, extra_tokens + keep, C']``, contiguous.

    Raises:
        TypeError: ``scores`` is not float32.
        ValueError: an argument has another shape, range or device than said here.
    """
    return _prune_tokens(scores, x, y, keep, extra_tokens)


def _check(scores, x, y, keep, extra_tokens):
    check_selection(scores, keep)
    batch, patches = scores.shape
    for name, tokens in (("x", x), ("y", y)):
        check_shape(name, tokens, "BNC")
        if tokens.shape[0] != batch or tokens.shape[1] != extra_tokens + patches:
            raise ValueError(
                f"{name}: expected [{batch}, {extra_tokens} + {patches}, C] for scores [{batch}, {patches}] and "
                f"extra_tokens {extra_tokens}, got {list(tokens.shape)}"
            )
        check_device(name, tokens, "scores", scores)
    check_extra_tokens(extra_tokens, x.shape[1])


def _fake(scores, x, y, keep, extra_tokens):
    batch = scores.shape[0]
    index = scores.new_empty((batch, keep), dtype=torch.int64)
    return index, *(t.new_empty((batch, extra_tokens + keep, t.shape[2])) for t in (x, y))


def _compiled(scores, x, y, keep, extra_tokens):
    batch, patches = scores.shape
    if scores.is_cuda and patches > _C.MAX_PATCHES:
        return reference(scores, x, y, keep, extra_tokens)
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    index = torch.empty((batch, keep), dtype=torch.int64, device=scores.device)
    sources, outs, rows = [], [], []
    for tokens in (x, y):
        tokens, (source, batch_stride, token_stride, row) = rows_of(tokens)
        out = tokens.new_empty((batch, extra_tokens + keep, tokens.shape[2]))
        sources.append(tokens)  # keeps a contiguous copy alive until the launch
        outs.append(out)
        rows.append((source, out.data_ptr(), batch_stride, token_stride, row))
    selection = (scores.data_ptr(), batch, patches, scores.stride(0), keep, index.data_ptr())
    launch("prune_tokens", scores, *selection, extra_tokens, rows)
    return index, *outs


_prune_tokens = define(
    "prune_tokens(Tensor scores, Tensor x, Tensor y, SymInt keep, SymInt extra_tokens) -> (Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=reference,
    cpu=_compiled,
    cuda=_compiled,
)


def _setup_context(ctx, inputs, output):
    _, x, _, _, ctx.extra_tokens = inputs
    index = output[0]
    ctx.tokens = x.shape[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index)


def _backward(ctx, _, *grads):
    (index,) = ctx.saved_tensors
    grad_x, grad_y = (g if g is None else scatter_tokens(g, index, ctx.extra_tokens, ctx.tokens) for g in grads)
    return None, grad_x, grad_y, None, None


torch.library.register_autograd("pruneattn::prune_tokens", _backward, setup_context=_setup_context, lib=LIBRARY)
