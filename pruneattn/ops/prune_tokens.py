"""Selection of patches and gathering of two tensors, in one launch instead of three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._checks import check_device, check_extra_tokens, check_not_empty, check_shape
from ._layout import together
from ._registration import LIBRARY, define
from .backend import _C, launch
from .gather_tokens import reference as gather_reference
from .gather_tokens import rows_of, scatter_tokens
from .select_tokens import check_selection
from .select_tokens import reference as select_reference

#: ``index``, ``x_kept`` and ``y_kept``.
Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
#: Source and destination address, batch stride, token stride and row size of a tensor, in bytes.
Rows = tuple[int, int, int, int, int]


def reference(scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int) -> Kept:
    """Define :func:`prune_tokens` in plain PyTorch."""
    index = select_reference(scores, keep)
    return index, gather_reference(x, index, extra_tokens), gather_reference(y, index, extra_tokens)


def prune_tokens(scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int) -> Kept:
    """Fuse ``select_tokens(scores, keep)`` with ``gather_tokens`` of ``x`` and of ``y``.

    There are two tensors because a pruning block needs the same rows of the residual stream and of the attention
    output. Differentiable in ``x`` and ``y``, not in ``scores``.

    Args:
        scores: Scores ``[B, P]``, float32, with any strides.
        x: Tokens ``[B, N, C]`` with N = extra_tokens + P, with any dtype and strides.
        y: Tokens ``[B, N, C']``, with any dtype and strides.
        keep: Number of patches to keep, 1 to P.
        extra_tokens: Number of tokens before the patches.

    Returns:
        A tuple ``(index, x_kept, y_kept)``:

        - index: Ascending patch numbers ``[B, keep]``, int64.
        - x_kept: ``[B, extra_tokens + keep, C]`` with the dtype of ``x``, contiguous.
        - y_kept: ``[B, extra_tokens + keep, C']`` with the dtype of ``y``, contiguous.

    Raises:
        TypeError: ``scores`` is not float32.
        ValueError: An argument has another shape, range or device.
    """
    return _prune_tokens(scores, x, y, keep, extra_tokens)


def check_tokens(
    x: torch.Tensor, y: torch.Tensor, patches: int, extra_tokens: int, name: str, other: torch.Tensor
) -> None:
    """Check that ``x`` and ``y`` have ``extra_tokens + patches`` tokens, and the batch and device of ``other``."""
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


def empty_kept(x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int) -> Kept:
    """Return uninitialized ``index``, ``x_kept`` and ``y_kept``."""
    x_kept, y_kept = (t.new_empty((t.shape[0], extra_tokens + keep, t.shape[2])) for t in (x, y))
    return x.new_empty((x.shape[0], keep), dtype=torch.int64), x_kept, y_kept


def rows_to_copy(
    tokens: Sequence[torch.Tensor], kept: Sequence[torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], list[Rows]]:
    """Return the tensors with contiguous rows, which must stay alive until the launch, and the rows to copy."""
    tokens, places = zip(*map(rows_of, tokens), strict=True)
    rows = [(source, out.data_ptr(), *layout) for (source, *layout), out in zip(places, kept, strict=True)]
    return tokens, rows


def _check(scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int) -> None:
    check_selection(scores, keep)
    check_tokens(x, y, scores.shape[1], extra_tokens, "scores", scores)


def _fake(scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int) -> Kept:
    return empty_kept(x, y, keep, extra_tokens)


def compiled(scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int) -> Kept:
    """Run :func:`prune_tokens` with the compiled kernel for the device."""
    batch, patches = scores.shape
    if scores.is_cuda and patches > _C.MAX_PATCHES:
        return reference(scores, x, y, keep, extra_tokens)
    scores = together(scores)
    index, *kept = results = empty_kept(x, y, keep, extra_tokens)
    _tokens, rows = rows_to_copy((x, y), kept)
    selection = (scores.data_ptr(), batch, patches, scores.stride(0), keep, index.data_ptr())
    launch("prune_tokens", scores, *selection, extra_tokens, rows)
    return results


_prune_tokens = define(
    "prune_tokens(Tensor scores, Tensor x, Tensor y, SymInt keep, SymInt extra_tokens) -> (Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=reference,
    cpu=compiled,
    cuda=compiled,
)


def differentiable_in_tokens(name: str, x_place: int) -> None:
    """Register the gradient of an op with respect to ``x`` and ``y`` only.

    Args:
        name: Name of an op that returns optional scores, ``index``, ``x_kept`` and ``y_kept``.
        x_place: Position of ``x`` in its arguments. ``y``, ``keep`` and ``extra_tokens`` follow.
    """

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *scores, index, _, _ = output
        ctx.arguments = len(inputs)
        ctx.tokens, ctx.extra_tokens = inputs[x_place].shape[1], inputs[x_place + 3]
        ctx.mark_non_differentiable(*scores)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index)

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        result: list[torch.Tensor | None] = [None] * ctx.arguments
        for place, grad in enumerate(grads[-2:], x_place):
            if grad is not None:
                result[place] = scatter_tokens(grad, index, ctx.extra_tokens, ctx.tokens)
        return tuple(result)

    torch.library.register_autograd(f"pruneattn::{name}", backward, setup_context=setup_context, lib=LIBRARY)


differentiable_in_tokens("prune_tokens", x_place=1)
