"""Importance of a patch as the attention the class token pays to it (the paper's score for AST)."""

import torch
from torch.utils.flop_counter import register_flop_formula

from ._checks import ATTENTION_DTYPES, check_dtype, check_extra_tokens, check_like, check_not_empty, check_shape
from ._layout import heads_of, near
from ._registration import LIBRARY, define
from .attention import CPU_DTYPES, CUDA_DTYPES, scale_of
from .backend import _C, launch


def reference(q_cls, k, extra_tokens, scale=None):
    """The definition of :func:`cls_scores` in plain PyTorch."""
    exact = torch.promote_types(k.dtype, torch.float32)  # half precision is never multiplied into half precision
    logits = (k.to(exact) @ q_cls.to(exact).unsqueeze(-1)).squeeze(-1) * scale_of(q_cls, scale)  # [B, H, N]
    return logits.softmax(-1)[:, :, extra_tokens:].mean(1).float().detach()  # [B, N - extra_tokens]


def cls_scores(q_cls, k, extra_tokens, scale=None):
    """Score of each patch: the class token's row of the softmax matrix, averaged over heads (paper, eq. 2b).

    Computed in float32 from the first accumulation, also for half-precision inputs (float64 in float64, and then
    rounded). Inside autocast, the inputs are cast as those of ``scaled_dot_product_attention`` are. Not differentiable.

    Args:
        q_cls: the class token's queries ``[B, H, D]``, floating point, any strides.
        k: the keys of all tokens ``[B, H, N, D]``, dtype of ``q_cls``, any strides.
        extra_tokens: how many tokens at the front are not patches: in the softmax, but not scored.
        scale: factor of the logits; ``D ** -0.5`` if not given.

    Returns:
        float32 ``[B, N - extra_tokens]``.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, range or device than said here.
    """
    return _cls_scores(q_cls, k, extra_tokens, scale)


def check_scoring(q_cls, k, extra_tokens, scale=None):
    """Raise unless these are arguments of :func:`cls_scores`."""
    check_shape("k", k, "BHND")
    batch, heads, tokens, channels = k.shape
    check_shape("q_cls", q_cls, "BHD", (batch, heads, channels))
    check_dtype("q_cls", q_cls, ATTENTION_DTYPES)
    check_like("k", k, "q_cls", q_cls)
    check_not_empty("k", k, "BHND")
    check_extra_tokens(extra_tokens, tokens)


def _fake(q_cls, k, extra_tokens, scale=None):
    return k.new_empty((k.shape[0], k.shape[2] - extra_tokens), dtype=torch.float32)


def cpu_scores(q_cls, k, extra_tokens, scale=None):
    """:func:`cls_scores` by the CPU kernel where it takes the input."""
    if k.dtype == torch.float64:
        return reference(q_cls, k, extra_tokens, scale)
    if k.dtype == torch.float16:
        return cpu_scores(q_cls.float(), k.float(), extra_tokens, scale)
    scores = _fake(q_cls, k, extra_tokens)
    (q, q_heads), (k, k_heads) = heads_of(q_cls.unsqueeze(2)), heads_of(k)
    places = (q_heads, k_heads)
    launch("cls_scores", q, CPU_DTYPES[k.dtype], *k.shape, *places, scale_of(q, scale), extra_tokens, scores.data_ptr())
    return scores


def cuda_partials(q_cls, k, extra_tokens, scale=None):
    """Rows that add up to the scores, float32 ``[B, R, P]``: one per head, by the CUDA kernel where it takes the input."""
    batch, heads, tokens, _ = k.shape
    if k.dtype not in CUDA_DTYPES or tokens > _C.MAX_TOKENS:
        return reference(q_cls, k, extra_tokens, scale).unsqueeze(1)
    partials = k.new_empty((batch, heads, tokens - extra_tokens), dtype=torch.float32)
    (q, q_heads), (k, k_heads) = heads_of(q_cls.unsqueeze(2)), heads_of(k)
    places = (q_heads, k_heads)
    launch(
        "cls_scores", q, CUDA_DTYPES[k.dtype], *k.shape, *places, scale_of(q, scale), extra_tokens, partials.data_ptr()
    )
    return partials


def triton_partials(q_cls, k, extra_tokens, scale=None):
    """As :func:`cuda_partials`, by the Triton kernel."""
    from ..kernels import cls_scores as kernel
    from ..kernels.launch import takes

    if not takes(k):
        return reference(q_cls, k, extra_tokens, scale).unsqueeze(1)
    weights = k.new_empty(k.shape[:3], dtype=torch.float32)  # [B, H, N]
    kernel.cls_weights(near(q_cls.unsqueeze(2)), near(k), weights, scale_of(q_cls, scale))
    return weights[:, :, extra_tokens:]


def _cuda(q_cls, k, extra_tokens, scale=None):
    return cuda_partials(q_cls, k, extra_tokens, scale).sum(1)


def _triton(q_cls, k, extra_tokens, scale=None):
    return triton_partials(q_cls, k, extra_tokens, scale).sum(1)


_cls_scores = define(
    "cls_scores(Tensor q_cls, Tensor k, SymInt extra_tokens, float? scale=None) -> Tensor",
    check=check_scoring,
    fake=_fake,
    autocast="cast",
    reference=reference,
    cpu=cpu_scores,
    cuda=_cuda,
    triton=_triton,
)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


def _backward(ctx, grad):
    return None, None, None, None


torch.library.register_autograd("pruneattn::cls_scores", _backward, setup_context=_setup_context, lib=LIBRARY)


@register_flop_formula(torch.ops.pruneattn.cls_scores)
def flops(q_cls, k, *_, **__):
    """Of the op, for keys of this shape."""
    batch, heads, tokens, channels = k
    return 2 * batch * heads * tokens * channels
