"""Selection and gathering of two tensors at once: one launch instead of three."""

import torch

from ._checks import check_device, check_extra_tokens, check_not_empty, check_shape
from ._layout import together
from ._registration import LIBRARY, define
from .backend import _C, launch
from .gather_tokens import reference as gather_reference
from .gather_tokens import rows_of, scatter_tokens
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


def check_tokens(x, y, patches, extra_tokens, name, other):
    """Raise unless x and y have a token per patch, and extra ones, in the batch and on the device of another argument."""
    batch = other.shape[0]
    for tokens_name, tokens in (("x", x), ("y", y)):
        check_shape(tokens_name, tokens, "BNC")
        if tokens.shape[0] != batch or tokens.shape[1] != extra_tokens + patches:
            raise ValueError(
                f"{tokens_name}: expected [{batch}, {extra_tokens} + {patches}, C] for {name} {list(other.shape)} and "
                f"extra_tokens {extra_tokens}, got {list(tokens.shape)}"
            )
        check_not_empty(tokens_name, tokens, "BNC")
        check_device(tokens_name, tokens, name, other)
    check_extra_tokens(extra_tokens, x.shape[1])


def empty_kept(x, y, keep, extra_tokens):
    """Uninitialised ``index``, ``x_kept`` and ``y_kept``."""
    kept = (t.new_empty((t.shape[0], extra_tokens + keep, t.shape[2])) for t in (x, y))
    return x.new_empty((x.shape[0], keep), dtype=torch.int64), *kept


def rows_to_copy(tokens, kept):
    """The tensors with contiguous rows, to be kept alive until the launch, and where a kernel finds theirs and puts them."""
    tokens, places = zip(*map(rows_of, tokens))
    rows = [(source, out.data_ptr(), *layout) for (source, *layout), out in zip(places, kept)]
    return tokens, rows


def _check(scores, x, y, keep, extra_tokens):
    check_selection(scores, keep)
    check_tokens(x, y, scores.shape[1], extra_tokens, "scores", scores)


def _fake(scores, x, y, keep, extra_tokens):
    return empty_kept(x, y, keep, extra_tokens)


def compiled(scores, x, y, keep, extra_tokens):
    """:func:`prune_tokens` by the compiled kernel for the device."""
    batch, patches = scores.shape
    if scores.is_cuda and patches > _C.MAX_PATCHES:
        return reference(scores, x, y, keep, extra_tokens)
    scores = together(scores)
    index, *kept = empty_kept(x, y, keep, extra_tokens)
    tokens, rows = rows_to_copy((x, y), kept)
    selection = (scores.data_ptr(), batch, patches, scores.stride(0), keep, index.data_ptr())
    launch("prune_tokens", scores, *selection, extra_tokens, rows)
    return index, *kept


_prune_tokens = define(
    "prune_tokens(Tensor scores, Tensor x, Tensor y, SymInt keep, SymInt extra_tokens) -> (Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=reference,
    cpu=compiled,
    cuda=compiled,
)


def differentiable_in_tokens(name, x_place):
    """Register the gradient of an op with respect to ``x`` and ``y`` alone.

    Args:
        name: of an op that returns scores (or not), ``index``, ``x_kept`` and ``y_kept``.
        x_place: place of ``x`` among its arguments; ``y``, ``keep`` and ``extra_tokens`` come after it.
    """

    def setup_context(ctx, inputs, output):
        *scores, index, _, _ = output
        ctx.arguments = len(inputs)
        ctx.tokens, ctx.extra_tokens = inputs[x_place].shape[1], inputs[x_place + 3]
        ctx.mark_non_differentiable(*scores)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index)

    def backward(ctx, *grads):
        (index,) = ctx.saved_tensors
        result = [None] * ctx.arguments
        for place, grad in enumerate(grads[-2:], x_place):
            if grad is not None:
                result[place] = scatter_tokens(grad, index, ctx.extra_tokens, ctx.tokens)
        return tuple(result)

    torch.library.register_autograd(f"pruneattn::{name}", backward, setup_context=setup_context, lib=LIBRARY)


differentiable_in_tokens("prune_tokens", x_place=1)
