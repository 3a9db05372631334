"""Pruning by the class token: scores, selection of patches, gathering of two tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

from ._checks import check_keep
from ._registration import define
from .backend import choose
from .cls_scores import check_scoring, cpu_scores, cuda_partials, flops, triton_partials
from .cls_scores import reference as cls_reference
from .prune_epilogue import ScoredAndKept
from .prune_tokens import check_tokens, differentiable_in_tokens, empty_kept
from .prune_tokens import compiled as prune_compiled
from .prune_tokens import reference as prune_reference


def reference(
    q_cls: torch.Tensor,
    k: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    keep: int,
    extra_tokens: int,
    scale: float | None = None,
) -> ScoredAndKept:
    """Define :func:`cls_prune_tokens` in plain PyTorch."""
    scores = cls_reference(q_cls, k, extra_tokens, scale)
    return scores, *prune_reference(scores, x, y, keep, extra_tokens)


def cls_prune_tokens(
    q_cls: torch.Tensor,
    k: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    keep: int,
    extra_tokens: int,
    scale: float | None = None,
) -> ScoredAndKept:
    """Fuse ``cls_scores(q_cls, k, extra_tokens, scale)`` with ``prune_tokens`` of ``x`` and ``y`` by these scores.

    On a GPU there are two launches: the second launch adds the scores of the heads and selects the patches.
    Differentiable in ``x`` and ``y``. Inside autocast, ``q_cls`` and ``k`` are cast as in :func:`cls_scores`; ``x`` and
    ``y`` are not.

    Args:
        q_cls: Queries of the class token ``[B, H, D]``, float32, bfloat16, float16 or float64, with any strides.
        k: Keys of all tokens ``[B, H, N, D]``, with the dtype of ``q_cls`` and any strides.
        x: Tokens ``[B, N, C]``, with any dtype and strides.
        y: Tokens ``[B, N, C']``, with any dtype and strides.
        keep: Number of patches to keep, 1 to N - extra_tokens.
        extra_tokens: Number of tokens before the patches.
        scale: Factor of the logits; ``D ** -0.5`` if it is None.

    Returns:
        A tuple ``(scores, index, x_kept, y_kept)``:

        - scores: Scores ``[B, N - extra_tokens]``, float32, by which the patches are selected.
        - index: Ascending patch numbers ``[B, keep]``, int64.
        - x_kept: ``[B, extra_tokens + keep, C]`` with the dtype of ``x``, contiguous.
        - y_kept: ``[B, extra_tokens + keep, C']`` with the dtype of ``y``, contiguous.

    Raises:
        TypeError: An argument has another dtype.
        ValueError: An argument has another shape, range or device.
    """
    return _cls_prune_tokens(q_cls, k, x, y, keep, extra_tokens, scale)


def _check(
    q_cls: torch.Tensor,
    k: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    keep: int,
    extra_tokens: int,
    scale: float | None = None,
) -> None:
    check_scoring(q_cls, k, extra_tokens, scale)
    patches = k.shape[2] - extra_tokens
    check_keep(keep, patches)
    check_tokens(x, y, patches, extra_tokens, "k", k)


def _fake(
    q_cls: torch.Tensor,
    k: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    keep: int,
    extra_tokens: int,
    scale: float | None = None,
) -> ScoredAndKept:
    scores = k.new_empty((k.shape[0], k.shape[2] - extra_tokens), dtype=torch.float32)
    return scores, *empty_kept(x, y, keep, extra_tokens)


def _cpu(
    q_cls: torch.Tensor,
    k: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    keep: int,
    extra_tokens: int,
    scale: float | None = None,
) -> ScoredAndKept:
    scores = cpu_scores(q_cls, k, extra_tokens, scale)
    return scores, *prune_compiled(scores, x, y, keep, extra_tokens)


def _by_partials(partials_of: Callable[..., torch.Tensor]) -> Callable[..., ScoredAndKept]:
    """Return the op as a kernel that writes partial scores, followed by the best usable epilogue."""

    def run(
        q_cls: torch.Tensor,
        k: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        keep: int,
        extra_tokens: int,
        scale: float | None = None,
    ) -> ScoredAndKept:
        prune = choose("prune_epilogue", k.device.type)
        return prune(partials_of(q_cls, k, extra_tokens, scale), x, y, keep, extra_tokens)

    return run


_cls_prune_tokens = define(
    "cls_prune_tokens(Tensor q_cls, Tensor k, Tensor x, Tensor y, SymInt keep, SymInt extra_tokens, float? scale=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast=("q_cls", "k"),
    reference=reference,
    cpu=_cpu,
    cuda=_by_partials(cuda_partials),
    triton=_by_partials(triton_partials),
)

differentiable_in_tokens("cls_prune_tokens", x_place=2)


register_flop_formula(torch.ops.pruneattn.cls_prune_tokens, get_raw=True)(flops)
