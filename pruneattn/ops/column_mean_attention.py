"""Attention that also returns how much attention each patch receives (the paper's score for AudioMAE)."""

import torch
from torch.utils.flop_counter import register_flop_formula

from ._checks import ATTENTION_DTYPES, check_dtype, check_extra_tokens, check_like, check_shape
from ._registration import LIBRARY, define


def reference(q, k, v, extra_tokens, scale=None):
    """The definition of :func:`column_mean_attention` in plain PyTorch."""
    weights = _softmax_matrix(q, k, scale)  # [B, H, N, N]
    out = weights.to(v.dtype) @ v  # [B, H, N, D]
    # The projection reads [B, N, H * D]: store the rows of a token together.
    out = out.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    # Rows first, then heads: one contiguous pass over the matrix.
    scores = weights[:, :, extra_tokens:, extra_tokens:].mean(2).mean(1)  # [B, N - extra_tokens]
    return out, scores.float().detach()


def backward_reference(grad_out, q, k, v, scale=None):
    """Gradients of the attention output with respect to q, k and v, from the inputs alone."""
    weights = _softmax_matrix(q, k, scale)  # [B, H, N, N]
    grad_v = weights.to(v.dtype).transpose(-2, -1) @ grad_out  # [B, H, N, D]
    grad_weights = _exact(grad_out) @ _exact(v).transpose(-2, -1)  # [B, H, N, N]
    centred = grad_weights - (grad_weights * weights).sum(-1, keepdim=True)
    grad_logits = (weights * centred * _scale(q, scale)).to(q.dtype)
    return grad_logits @ k, grad_logits.transpose(-2, -1) @ q, grad_v


def _softmax_matrix(q, k, scale):
    logits = (_exact(q) * _scale(q, scale)) @ _exact(k).transpose(-2, -1)  # [B, H, N, N]
    return logits.softmax(-1)


def _exact(x):
    # Half precision is multiplied and added up in float32: a product rounded to half would already change the ranking.
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


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
    return _column_mean_attention(q, k, v, extra_tokens, scale)


def _check_qkv(q, k, v):
    check_shape("q", q, "BHND")
    check_shape("k", k, "BHND", q.shape)
    check_shape("v", v, "BHND", q.shape)
    check_dtype("q", q, ATTENTION_DTYPES)
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)


def _check(q, k, v, extra_tokens, scale=None):
    _check_qkv(q, k, v)
    check_extra_tokens(extra_tokens, q.shape[2])


def _check_backward(grad_out, q, k, v, scale=None):
    _check_qkv(q, k, v)
    check_shape("grad_out", grad_out, "BHND", q.shape)
    check_like("grad_out", grad_out, "q", q)


def _fake(q, k, v, extra_tokens, scale=None):
    batch, heads, tokens, channels = q.shape
    out = q.new_empty((batch, tokens, heads, channels)).transpose(1, 2)
    return out, q.new_empty((batch, tokens - extra_tokens), dtype=torch.float32)


def _fake_backward(grad_out, q, k, v, scale=None):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


_column_mean_attention = define(
    "column_mean_attention(Tensor q, Tensor k, Tensor v, SymInt extra_tokens, float? scale=None) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast="cast",
    reference=reference,
)
_column_mean_attention_backward = define(
    "column_mean_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, float? scale=None)"
    " -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    autocast="off",
    reference=backward_reference,
)


def _setup_context(ctx, inputs, output):
    q, k, v, _, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v)


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return None, None, None, None, None
    return *_column_mean_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None, None


def _no_second_backward(ctx, *grads):
    raise NotImplementedError("pruneattn::column_mean_attention can be differentiated once, not twice")


torch.library.register_autograd(
    "pruneattn::column_mean_attention", _backward, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd("pruneattn::column_mean_attention_backward", _no_second_backward, lib=LIBRARY)


@register_flop_formula(torch.ops.pruneattn.column_mean_attention)
def _flops(q, *_, **__):
    batch, heads, tokens, channels = q
    return 2 * 2 * batch * heads * tokens * tokens * channels  # two matrix products, a multiplication and an addition


@register_flop_formula(torch.ops.pruneattn.column_mean_attention_backward)
def _backward_flops(grad_out, *_, **__):
    batch, heads, tokens, channels = grad_out
    return 5 * 2 * batch * heads * tokens * tokens * channels  # the softmax matrix again, then four products
