"""A pruning block's choice by its class token: scores, selection and the gather of two tensors."""

import torch
from torch.utils.flop_counter import register_flop_formula

from ._checks import check_keep
from ._registration import define
from .backend import choose
from .cls_scores import check_scoring, cpu_scores, cuda_partials, flops, triton_partials
from .cls_scores import reference as cls_reference
from .prune_tokens import check_tokens, differentiable_in_tokens, empty_kept
from .prune_tokens import compiled as prune_compiled
from .prune_tokens import reference as prune_reference


def reference(q_cls, k, x, y, keep, extra_tokens, scale=None):
    """The definition of :func:`cls_prune_tokens` in plain PyTorch."""
    scores = cls_reference(q_cls, k, extra_tokens, scale)
    return scores, *prune_reference(scores, x, y, keep, extra_tokens)


def cls_prune_tokens(q_cls, k, x, y, keep, extra_tokens, scale=None):
    """``cls_scores(q_cls, k, extra_tokens, scale)``, and ``prune_tokens`` of ``x`` and ``y`` by them, fused.

    On a GPU the heads' scores are added up where the patches are selected: two launches. Differentiable in ``x`` and
    ``y``. Inside autocast, ``q_cls`` and ``k`` are cast as those of :func:`cls_scores` are; ``x`` and ``y`` stay.

    Args:
        q_cls: the class token's queries ``[B, H, D]``, floating point, any strides.
        k: the keys of all tokens ``[B, H, N, D]``, dtype of ``q_cls``, any strides.
        x: tokens ``[B, N, C]``, any dtype, any strides.
        y: tokens ``[B, N, C']``, any dtype, any strides.
        keep: how many patches to keep, 1 to N - extra_tokens.
        extra_tokens: how many tokens at the front are not patches.
        scale: factor of the logits; ``D ** -0.5`` if not given.

    Returns:
        scores: float32 ``[B, N - extra_tokens]``, by which the patches are selected.
        index: int64 ``[B, keep]``, ascending patch numbers.
        x_kept: ``[B, extra_tokens + keep, C]``, contiguous.
        y_kept: ``[B, extra_tokens + keep, C']``, contiguous.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, range or device than said here.
    """
    return _cls_prune_tokens(q_cls, k, x, y, keep, extra_tokens, scale)


def _check(q_cls, k, x, y, keep, extra_tokens, scale=None):
    check_scoring(q_cls, k, extra_tokens, scale)
    patches = k.shape[2] - extra_tokens
    check_keep(keep, patches)
    check_tokens(x, y, patches, extra_tokens, "k", k)


def _fake(q_cls, k, x, y, keep, extra_tokens, scale=None):
    scores = k.new_empty((k.shape[0], k.shape[2] - extra_tokens), dtype=torch.float32)
    return scores, *empty_kept(x, y, keep, extra_tokens)


def _cpu(q_cls, k, x, y, keep, extra_tokens, scale=None):
    scores = cpu_scores(q_cls, k, extra_tokens, scale)
    return scores, *prune_compiled(scores, x, y, keep, extra_tokens)


def _by_partials(partials_of):
    """The op by a kernel that leaves partial scores, which the best epilogue that may run adds up."""

    def run(q_cls, k, x, y, keep, extra_tokens, scale=None):
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
