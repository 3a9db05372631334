"""Attention that also returns the attention that each patch receives (the paper's score for AudioMAE)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._attention import CPU_DTYPES, CUDA_DTYPES, check_qkv, empty_outputs, logits, scale_of
from ._checks import check_extra_tokens, check_shape
from ._layout import aligned, heads_of, near, rows_together
from ._registration import LIBRARY, define
from .attention_backward import attention_backward
from .backend import _C, launch, stands_in

#: ``out``, scores (or rows that add up to them) and ``lse``.
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_tokens: int, scale: float | None = None
) -> Results:
    """Define :func:`column_mean_attention` in plain PyTorch.

    Returns:
        ``out`` and ``scores`` of :func:`column_mean_attention`, and the log-sum-exp of the logits, which the gradient
        needs, ``[B, H, N]`` in at least float32.
    """
    rows = logits(q, k, scale)  # [B, H, N, N]
    weights = rows.softmax(-1)
    out = rows_together(weights.to(v.dtype) @ v)  # [B, H, N, D]
    # Rows first, then heads: one contiguous pass over the matrix.
    scores = weights[:, :, extra_tokens:, extra_tokens:].mean(2).mean(1)  # [B, N - extra_tokens]
    return out, scores.float().detach(), rows.logsumexp(-1)


def column_mean_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_tokens: int, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention, and score each patch by the attention that it receives (paper, eq. 2a).

    The score is the mean of the patch's column in the softmax matrix, over heads and over the query rows of patches.
    Extra tokens are part of the softmax, but their rows and columns are not part of the scores. Scores are computed in
    float32 from the first accumulation, also for half-precision inputs. For float64 inputs they are computed in
    float64, then rounded. The output is differentiable once in ``q``, ``k`` and ``v``; the scores are not
    differentiable. Inside autocast, the inputs are cast like those of ``scaled_dot_product_attention``.

    Args:
        q: Queries ``[B, H, N, D]``, float32, bfloat16, float16 or float64, with any strides: for example a view of a
            packed qkv projection.
        k: Keys ``[B, H, N, D]``, with the dtype of ``q`` and any strides.
        v: Values ``[B, H, N, D]``, with the dtype of ``q`` and any strides.
        extra_tokens: Number of tokens before the patches.
        scale: Factor of the logits; ``D ** -0.5`` if it is None.

    Returns:
        A tuple ``(out, scores)``:

        - out: Attention output ``[B, H, N, D]``, dtype of ``q``. ``out.transpose(1, 2).flatten(2)`` is a view of it.
        - scores: Scores ``[B, N - extra_tokens]``, float32.

    Raises:
        TypeError: An argument has another dtype.
        ValueError: An argument has another shape, range or device.
    """
    return _column_mean_attention(q, k, v, extra_tokens, scale)[:2]


def check_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_tokens: int, scale: float | None = None
) -> None:
    """Check the arguments of :func:`column_mean_attention`."""
    check_shape("q", q, "BHND")
    check_shape("k", k, "BHND", q.shape)
    check_qkv(q, k, v)
    check_extra_tokens(extra_tokens, q.shape[2])


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_tokens: int, scale: float | None = None) -> Results:
    out, lse = empty_outputs(q)
    return out, q.new_empty((q.shape[0], q.shape[2] - extra_tokens), dtype=torch.float32), lse


def cpu_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_tokens: int, scale: float | None = None
) -> Results:
    """Run :func:`column_mean_attention` with the CPU kernel, or with the reference for dtypes without a kernel.

    The log-sum-exp of the logits is the third result.
    """
    if q.dtype == torch.float64:
        return reference(q, k, v, extra_tokens, scale)
    if q.dtype == torch.float16:
        out, scores, lse = cpu_attention(q.float(), k.float(), v.float(), extra_tokens, scale)
        return out.half(), scores, lse
    out, scores, lse = _fake(q, k, v, extra_tokens)
    (q, q_heads), (k, k_heads), (v, v_heads) = map(heads_of, (q, k, v))
    places = (q_heads, k_heads, v_heads, heads_of(out)[1], lse.data_ptr())
    dtype, scale = CPU_DTYPES[q.dtype], scale_of(q, scale)
    launch("column_mean_attention", q, dtype, *q.shape, *places, scale, extra_tokens, scores.data_ptr())
    return out, scores, lse


def cuda_partials(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_tokens: int, scale: float | None = None
) -> Results:
    """Compute attention and, instead of the scores, rows ``[B, R, P]`` in float32 whose sum over R is the scores.

    The CUDA kernel runs for half precision, heads of 64 channels, a positive scale and clips that fit into shared
    memory. The Triton kernels replace it for other inputs, or the reference where they may not run.
    """
    scale, device = scale_of(q, scale), q.device.index or 0
    half = q.dtype in (torch.float16, torch.bfloat16)
    if not (half and q.shape[3] == 64 and q.shape[2] <= _most_tokens(device) and scale > 0):
        fallback = triton_partials if stands_in("triton", q.device.type) else _reference_partials
        return fallback(q, k, v, extra_tokens, scale)
    batch, heads, tokens, _ = q.shape
    out, lse = empty_outputs(q)
    parts = _C.cuda_attention_parts(batch * heads, tokens, device)
    partials = lse.new_empty((batch, heads * parts, tokens - extra_tokens))
    q, k, v = map(aligned, (q, k, v))  # alive until the launch
    places = (*(heads_of(x)[1] for x in (q, k, v, out)), lse.data_ptr())
    options = (scale, extra_tokens, partials.data_ptr(), parts)
    launch("column_mean_attention", q, CUDA_DTYPES[q.dtype], *q.shape, *places, *options)
    return out, partials, lse


@functools.cache
def _most_tokens(device: int) -> int:
    return _C.cuda_most_tokens(device)


def triton_partials(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_tokens: int, scale: float | None = None
) -> Results:
    """Compute the results of :func:`cuda_partials` with the Triton kernels."""
    from ..kernels import attention, column_mean_attention
    from ..kernels.launch import takes

    if not takes(q):
        return _reference_partials(q, k, v, extra_tokens, scale)
    q, k, v = map(near, (q, k, v))
    out, lse = empty_outputs(q)
    maximum, inverse = torch.empty_like(lse), torch.empty_like(lse)
    attention.attention(q, k, v, out, lse, scale_of(q, scale), maximum, inverse)
    partials = lse.new_empty((*q.shape[:2], q.shape[2] - extra_tokens))  # [B, H, N - extra_tokens]
    column_mean_attention.column_sums(q, k, maximum, inverse, partials, extra_tokens, scale_of(q, scale))
    return out, partials, lse


def _reference_partials(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_tokens: int, scale: float | None = None
) -> Results:
    out, scores, lse = reference(q, k, v, extra_tokens, scale)
    return out, scores.unsqueeze(1), lse


def _added_up(partials_of: Callable[..., Results]) -> Callable[..., Results]:
    """Return the op as a function that computes partial scores, followed by their sum."""

    def run(*args: Any) -> Results:
        out, partials, lse = partials_of(*args)
        return out, partials.sum(1), lse

    return run


_column_mean_attention = define(
    "column_mean_attention(Tensor q, Tensor k, Tensor v, SymInt extra_tokens, float? scale=None)"
    " -> (Tensor, Tensor, Tensor)",
    check=check_attention,
    fake=_fake,
    autocast="cast",
    reference=reference,
    cpu=cpu_attention,
    cuda=_added_up(cuda_partials),
    triton=_added_up(triton_partials),
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, _, ctx.scale = inputs
    out, scores, lse = output
    ctx.mark_non_differentiable(scores, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx: Any, grad_out: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_out is None:
        return None, None, None, None, None
    q, k, v, out, lse = ctx.saved_tensors
    return *attention_backward(grad_out, q, k, v, out, lse, ctx.scale), None, None


torch.library.register_autograd(
    "pruneattn::column_mean_attention", _backward, setup_context=_setup_context, lib=LIBRARY
)


@register_flop_formula(torch.ops.pruneattn.column_mean_attention)
def flops(q: torch.Size, *_: Any, **__: Any) -> int:
    """Return the FLOPs of the op for queries of this shape."""
    batch, heads, tokens, channels = q
    return 2 * 2 * batch * heads * tokens * tokens * channels  # two matrix products, a multiplication and an addition
