"""What ends a pruning block's attention: partial scores are added up, the best patches selected, two tensors gathered."""

import torch

from ._checks import check_dtype, check_keep, check_shape
from ._layout import together
from ._registration import define
from .backend import _C, launch
from .prune_tokens import check_tokens, differentiable_in_tokens, empty_kept, rows_to_copy
from .prune_tokens import compiled as prune_compiled
from .prune_tokens import reference as prune_reference


def reference(partial_scores, x, y, keep, extra_tokens):
    """The definition of :func:`prune_epilogue` in plain PyTorch."""
    scores = partial_scores.sum(1)  # [B, P]
    return scores, *prune_reference(scores, x, y, keep, extra_tokens)


def prune_epilogue(partial_scores, x, y, keep, extra_tokens):
    """``prune_tokens(partial_scores.sum(1), x, y, keep, extra_tokens)``, fused: one launch on a GPU.

    For kernels that leave a row of scores per head, or per head and block of queries. Our CUDA kernel adds the rows up
    in their order, the same bits in every run. Differentiable in ``x`` and ``y``; not in ``partial_scores``.

    Args:
        partial_scores: float32 ``[B, R, P]``, at least one row, any strides.
        x: tokens ``[B, N, C]`` with N = extra_tokens + P, any dtype, any strides.
        y: tokens ``[B, N, C']``, any dtype, any strides.
        keep: how many patches to keep, 1 to P.
        extra_tokens: how many tokens at the front are not patches.

    Returns:
        scores: float32 ``[B, P]``, the sums, by which the patches are selected.
        index: int64 ``[B, keep]``, ascending patch numbers.
        x_kept: ``[B, extra_tokens + keep, C]``, contiguous.
        y_kept: ``[B, extra_tokens + keep, C']``, contiguous.

    Raises:
        TypeError: ``partial_scores`` is not float32.
        ValueError: an argument has another shape, range or device than said here.
    """
    return _prune_epilogue(partial_scores, x, y, keep, extra_tokens)


def _check(partial_scores, x, y, keep, extra_tokens):
    check_shape("partial_scores", partial_scores, "BRP")
    check_dtype("partial_scores", partial_scores, (torch.float32,))
    if partial_scores.shape[1] < 1:
        raise ValueError(f"partial_scores: expected at least one row, got {list(partial_scores.shape)}")
    check_keep(keep, partial_scores.shape[2])
    check_tokens(x, y, partial_scores.shape[2], extra_tokens, "partial_scores", partial_scores)


def _fake(partial_scores, x, y, keep, extra_tokens):
    batch, _, patches = partial_scores.shape
    return partial_scores.new_empty((batch, patches)), *empty_kept(x, y, keep, extra_tokens)


def _cpu(partial_scores, x, y, keep, extra_tokens):
    scores = partial_scores.sum(1)
    return scores, *prune_compiled(scores, x, y, keep, extra_tokens)


def _cuda(partial_scores, x, y, keep, extra_tokens):
    batch, rows, patches = partial_scores.shape
    if patches > _C.MAX_PATCHES:
        return reference(partial_scores, x, y, keep, extra_tokens)
    partials = together(partial_scores)
    scores, index, *kept = _fake(partials, x, y, keep, extra_tokens)
    tokens, copies = rows_to_copy((x, y), kept)
    places = (partials.data_ptr(), batch, rows, patches, *partials.stride()[:2])
    results = (scores.data_ptr(), index.data_ptr())
    launch("prune_epilogue", partials, *places, keep, *results, extra_tokens, copies)
    return scores, index, *kept


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
