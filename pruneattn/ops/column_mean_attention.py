"""Attention that also returns how much attention each patch receives (the paper's score for AudioMAE)."""

import functools

import torch
from torch.utils.flop_counter import register_flop_formula

from ._checks import check_extra_tokens, check_shape
from ._layout import aligned, heads_of, near, rows_together
from ._registration import LIBRARY, define
from .attention import CPU_DTYPES, CUDA_DTYPES, attention_backward, check_qkv, empty_outputs, logits, scale_of
from .backend import _C, launch, stands_in


def reference(q, k, v, extra_tokens, scale=None):
    """The definition of :func:`column_mean_attention` in plain PyTorch; third, the log-sum-exp for its gradient."""
    rows = logits(q, k, scale)  # [B, H, N, N]
    weights = rows.softmax(-1)
    out = rows_together(weights.to(v.dtype) @ v)  # [B, H, N, D]
    # Rows first, then heads: one contiguous pass over the matrix.
    scores = weights[:, :, extra_tokens:, extra_tokens:].mean(2).mean(1)  # [B, N - extra_tokens]
    return out, scores.float().detach(), rows.logsumexp(-1)


def column_mean_attention(q, k, v, extra_tokens, scale=None):
    """Attention, and the score of each patch: the attention it receives (paper, eq. 2a).

    The score is the softmax matrix averaged over heads and over the query rows of the patches; columns and rows of
    extra tokens are left out of the average, not out of the softmax. It is computed in float32 from the first
    accumulation, also for half-precision inputs (float64 in float64, and then rounded).
    The output is differentiable in q, k and v (once); the scores are not. Inside autocast, the inputs are cast as those
    of ``scaled_dot_product_attention`` are.

    Args:
        q, k, v: queries, keys, values ``[B, H, N, D]``, one floating dtype, any strides: views of a packed qkv are
            meant.
        extra_tokens: how many tokens at the front are not patches.
        scale: factor of the logits; ``D ** -0.5`` if not given.

    Returns:
        out: ``[B, H, N, D]``, dtype of q, stored as ``[B, N, H, D]``: ``out.transpose(1, 2).flatten(2)`` is a view.
        scores: float32 ``[B, N - extra_tokens]``.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, range or device than said here.
    """
    return _column_mean_attention(q, k, v, extra_tokens, scale)[:2]


def check_attention(q, k, v, extra_tokens, scale=None):
    """Raise unless these are arguments of :func:`column_mean_attention`."""
    check_shape("q", q, "BHND")
    check_shape("k", k, "BHND", q.shape)
    check_qkv(q, k, v)
    check_extra_tokens(extra_tokens, q.shape[2])


def _fake(q, k, v, extra_tokens, scale=None):
    out, lse = empty_outputs(q)
    return out, q.new_empty((q.shape[0], q.shape[2] - extra_tokens), dtype=torch.float32), lse


def cpu_attention(q, k, v, extra_tokens, scale=None):
    """:func:`column_mean_attention` and its log-sum-exp by the CPU kernel, where it takes the input."""
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


def cuda_partials(q, k, v, extra_tokens, scale=None):
    """As :func:`column_mean_attention`, with rows that add up to the scores, float32 ``[B, R, P]``, in their place.

    By the CUDA kernel for half precision, heads of 64 channels and as many tokens as it holds on chip; else by Triton's.
    """
    scale, device = scale_of(q, scale), q.device.index or 0
    half = q.dtype in (torch.float16, torch.bfloat16)
    if not (half and q.shape[3] == 64 and q.shape[2] <= _most_tokens(device) and scale > 0):
        return (triton_partials if stands_in("triton", q.device.type) else _reference_partials)(
            q, k, v, extra_tokens, scale
        )
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
def _most_tokens(device):
    return _C.cuda_most_tokens(device)


def triton_partials(q, k, v, extra_tokens, scale=None):
    """As :func:`cuda_partials`, by the Triton kernels."""
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


def _reference_partials(*args):
    out, scores, lse = reference(*args)
    return out, scores.unsqueeze(1), lse


def _added_up(partials_of):
    """The op by a function that leaves partial scores."""

    def run(*args):
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


def _setup_context(ctx, inputs, output):
    q, k, v, _, ctx.scale = inputs
    out, scores, lse = output
    ctx.mark_non_differentiable(scores, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx, grad_out, *_):
    if grad_out is None:
        return None, None, None, None, None
    return *attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None, None


torch.library.register_autograd(
    "pruneattn::column_mean_attention", _backward, setup_context=_setup_context, lib=LIBRARY
)


@register_flop_formula(torch.ops.pruneattn.column_mean_attention)
def flops(q, *_, **__):
    """Of the op, for queries of this shape."""
    batch, heads, tokens, channels = q
    return 2 * 2 * batch * heads * tokens * tokens * channels  # two matrix products, a multiplication and an addition
