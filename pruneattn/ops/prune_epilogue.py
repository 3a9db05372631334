"""The end of a pruning block's attention: sum of partial scores, selection of patches, gathering of two tensors."""

from __future__ import annotations

import torch

from ._checks import check_dtype, check_keep, check_shape
from ._layout import together
from ._registration import define
from .backend import _C, launch
from .prune_tokens import check_tokens, differentiable_in_tokens, empty_kept, rows_to_copy
from .prune_tokens import compiled as prune_compiled
from .prune_tokens import reference as prune_reference

#: ``scores``, ``index``, ``x_kept`` and ``y_kept``.
ScoredAndKept = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def reference(
    partial_scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int
) -> ScoredAndKept:
    """Define :func:`prune_epilogue` in plain PyTorch."""
    scores = partial_scores.sum(1)  # [B, P]
    return scores, *prune_reference(scores, x, y, keep, extra_tokens)


def prune_epilogue(
    partial_scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int
) -> ScoredAndKept:
    """Fuse ``partial_scores.sum(1)`` with ``prune_tokens`` by the sums: one launch on a GPU.

    It follows kernels that write one row of scores per head, or per head and block of queries. The CUDA kernel adds the
    rows in a fixed order, so every run returns the same bits. Differentiable in ``x`` and ``y``, not in
    ``partial_scores``.

    Args:
        partial_scores: Partial scores ``[B, R, P]``, float32, with at least one row and any strides.
        x: Tokens ``[B, N, C]`` with N = extra_tokens + P, with any dtype and strides.
        y: Tokens ``[B, N, C']``, with any dtype and strides.
        keep: Number of patches to keep, 1 to P.
        extra_tokens: Number of tokens before the patches.

    Returns:
        A tuple ``(scores, index, x_kept, y_kept)``:

        - scores: The sums ``[B, P]``, float32, by which the patches are selected.
        - index: Ascending patch numbers ``[B, keep]``, int64.
        - x_kept: ``[B, extra_tokens + keep, C]`` with the dtype of ``x``, contiguous.
        - y_kept: ``[B, extra_tokens + keep, C']`` with the dtype of ``y``, contiguous.

    Raises:
        TypeError: ``partial_scores`` is not float32.
        ValueError: An argument has another shape, range or device.
    """
    return _prune_epilogue(partial_scores, x, y, keep, extra_tokens)


def _check(partial_scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int) -> None:
    check_shape("partial_scores", partial_scores, "BRP")
    check_dtype("partial_scores", partial_scores, (torch.float32,))
    if partial_scores.shape[1] < 1:
        raise ValueError(f"partial_scores: expected at least one row, got {list(partial_scores.shape)}")
    check_keep(keep, partial_scores.shape[2])
    check_tokens(x, y, partial_scores.shape[2], extra_tokens, "partial_scores", partial_scores)


def _fake(
    partial_scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int
) -> ScoredAndKept:
    batch, _, patches = partial_scores.shape
    return partial_scores.new_empty((batch, patches)), *empty_kept(x, y, keep, extra_tokens)


def _cpu(partial_scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int) -> ScoredAndKept:
    scores = partial_scores.sum(1)
    return scores, *prune_compiled(scores, x, y, keep, extra_tokens)


def _cuda(
    partial_scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int
) -> ScoredAndKept:
    batch, rows, patches = partial_scores.shape
    if patches > _C.MAX_PATCHES:
        return reference(partial_scores, x, y, keep, extra_tokens)
    partials = together(partial_scores)
    scores, index, *kept = results = _fake(partials, x, y, keep, extra_tokens)
    _tokens, copies = rows_to_copy((x, y), kept)
    places = (partials.data_ptr(), batch, rows, patches, *partials.stride()[:2])
    launch("prune_epilogue", partials, *places, keep, scores.data_ptr(), index.data_ptr(), extra_tokens, copies)
    return results


_prune_epilogue = define(
    "prune_epilogue(Tensor partial_scores, Tensor x, Tensor y, SymInt keep, SymInt extra_tokens)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=reference,
    cpu=_cpu,
    cuda=_cuda,
)

differentiable_in_tokens("prune_epilogue", x_place=1)
