"""Attention of a pruning block that scores by column means: output, scores, selection of patches, gathering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._attention import empty_outputs
from ._checks import check_keep
from ._registration import LIBRARY, define
from .attention_backward import attention_backward
from .backend import choose
from .column_mean_attention import check_attention, cpu_attention, cuda_partials, flops, triton_partials
from .column_mean_attention import reference as attention_reference
from .gather_tokens import scatter_tokens
from .prune_epilogue import ScoredAndKept
from .prune_tokens import check_tokens, empty_kept
from .prune_tokens import compiled as prune_compiled
from .prune_tokens import reference as prune_reference

#: ``scores``, ``index``, ``x_kept``, ``out_kept``, and for the gradient ``out`` and ``lse``.
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def merged(out: torch.Tensor) -> torch.Tensor:
    """Return ``out`` ``[B, H, N, D]`` as rows for the projection, ``[B, N, H * D]``: a view of the kernels' output."""
    return out.transpose(1, 2).flatten(2)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    x: torch.Tensor,
    keep: int,
    extra_tokens: int,
    scale: float | None = None,
) -> Results:
    """Define :func:`pruned_attention` in plain PyTorch.

    Returns:
        ``scores``, ``index``, ``x_kept`` and ``out_kept`` of :func:`pruned_attention`, and for the gradient the
        attention output of all tokens and the log-sum-exp of the logits.
    """
    out, scores, lse = attention_reference(q, k, v, extra_tokens, scale)
    return scores, *prune_reference(scores, x, merged(out), keep, extra_tokens), out, lse


def pruned_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    x: torch.Tensor,
    keep: int,
    extra_tokens: int,
    scale: float | None = None,
) -> ScoredAndKept:
    """Fuse ``column_mean_attention(q, k, v, extra_tokens, scale)`` with ``prune_tokens`` of ``x`` and of its output.

    It computes the kept rows of a pruning block from queries, keys, values and the residual stream (paper, eq. 2a and
    section 3). On a GPU there are two launches: the second launch adds the parts of the scores and selects the patches.
    Differentiable in ``q``, ``k``, ``v`` (once) and ``x``. Inside autocast, ``q``, ``k`` and ``v`` are cast like those
    of ``scaled_dot_product_attention``; ``x`` is not.

    Args:
        q: Queries ``[B, H, N, D]``, float32, bfloat16, float16 or float64, with any strides.
        k: Keys ``[B, H, N, D]``, with the dtype of ``q`` and any strides.
        v: Values ``[B, H, N, D]``, with the dtype of ``q`` and any strides.
        x: Tokens ``[B, N, C]``, with any dtype and strides.
        keep: Number of patches to keep, 1 to N - extra_tokens.
        extra_tokens: Number of tokens before the patches.
        scale: Factor of the logits; ``D ** -0.5`` if it is None.

    Returns:
        A tuple ``(scores, index, x_kept, out_kept)``:

        - scores: Scores ``[B, N - extra_tokens]``, float32, by which the patches are selected.
        - index: Ascending patch numbers ``[B, keep]``, int64.
        - x_kept: ``[B, extra_tokens + keep, C]`` with the dtype of ``x``, contiguous.
        - out_kept: Attention output ``[B, extra_tokens + keep, H * D]`` with the dtype of ``q``, contiguous.

    Raises:
        TypeError: An argument has another dtype.
        ValueError: An argument has another shape, range or device.
    """
    return _pruned_attention(q, k, v, x, keep, extra_tokens, scale)[:4]


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    x: torch.Tensor,
    keep: int,
    extra_tokens: int,
    scale: float | None = None,
) -> None:
    check_attention(q, k, v, extra_tokens, scale)
    patches = q.shape[2] - extra_tokens
    check_keep(keep, patches)
    check_tokens(x, x, patches, extra_tokens, "q", q)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    x: torch.Tensor,
    keep: int,
    extra_tokens: int,
    scale: float | None = None,
) -> Results:
    out, lse = empty_outputs(q)
    scores = q.new_empty((q.shape[0], q.shape[2] - extra_tokens), dtype=torch.float32)
    return scores, *empty_kept(x, merged(out), keep, extra_tokens), out, lse


def _cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    x: torch.Tensor,
    keep: int,
    extra_tokens: int,
    scale: float | None = None,
) -> Results:
    out, scores, lse = cpu_attention(q, k, v, extra_tokens, scale)
    return scores, *prune_compiled(scores, x, merged(out), keep, extra_tokens), out, lse


def _by_partials(partials_of: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Callable[..., Results]:
    """Return the op as a kernel that writes partial scores, followed by the best usable epilogue."""

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        keep: int,
        extra_tokens: int,
        scale: float | None = None,
    ) -> Results:
        out, partials, lse = partials_of(q, k, v, extra_tokens, scale)
        prune = choose("prune_epilogue", q.device.type)
        scores, index, x_kept, out_kept = prune(partials, x, merged(out), keep, extra_tokens)
        return scores, index, x_kept, out_kept, out, lse

    return run


_pruned_attention = define(
    "pruned_attention(Tensor q, Tensor k, Tensor v, Tensor x, SymInt keep, SymInt extra_tokens, float? scale=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast=("q", "k", "v"),
    reference=reference,
    cpu=_cpu,
    cuda=_by_partials(cuda_partials),
    triton=_by_partials(triton_partials),
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, _, _, ctx.extra_tokens, ctx.scale = inputs
    scores, index, _, _, out, lse = output
    ctx.mark_non_differentiable(scores, index, out, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, index)


def _backward(
    ctx: Any, _: Any, __: Any, grad_x: torch.Tensor | None, grad_out: torch.Tensor | None, *___: Any
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse, index = ctx.saved_tensors
    batch, heads, tokens, channels = q.shape
    if grad_x is not None:
        grad_x = scatter_tokens(grad_x, index, ctx.extra_tokens, tokens)
    grads: tuple[torch.Tensor | None, ...] = (None, None, None)
    if grad_out is not None:
        grad_out = scatter_tokens(grad_out, index, ctx.extra_tokens, tokens)  # [B, N, H * D]
        grad_out = grad_out.view(batch, tokens, heads, channels).transpose(1, 2)
        grads = attention_backward(grad_out, q, k, v, out, lse, ctx.scale)
    return *grads, grad_x, None, None, None


torch.library.register_autograd("pruneattn::pruned_attention", _backward, setup_context=_setup_context, lib=LIBRARY)


register_flop_formula(torch.ops.pruneattn.pruned_attention, get_raw=True)(flops)
