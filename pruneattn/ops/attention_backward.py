"""Gradients of softmax attention, recomputed from its output and the log-sum-exp of its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._attention import check_qkv, exact, logits, scale_of
from ._checks import check_like, check_shape
from ._layout import near, together
from ._registration import LIBRARY, define

# In half precision, PyTorch's fused backward pass is slow for few tokens: 12 ms, where the reference takes 4 ms (65
# tokens, 96 heads, bfloat16, 2 threads). At 257 tokens both take the same time.
_FUSED_HALF_TOKENS = 256

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None = None,
) -> Grads:
    """Define :func:`attention_backward` in plain PyTorch."""
    weights = (logits(q, k, scale) - lse.unsqueeze(-1)).exp()  # [B, H, M, N]
    grad_v = weights.to(v.dtype).transpose(-2, -1) @ grad_out  # [B, H, N, D]
    grad_weights = exact(grad_out) @ exact(v).transpose(-2, -1)  # [B, H, M, N]
    centered = grad_weights - (exact(grad_out) * exact(out)).sum(-1, keepdim=True)
    grad_logits = (weights * centered * scale_of(q, scale)).to(q.dtype)
    return grad_logits @ k, grad_logits.transpose(-2, -1) @ q, grad_v


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None = None,
) -> Grads:
    """Compute the gradients of an attention output with respect to queries, keys and values.

    The backward pass of every attention op. Not differentiable again.

    Args:
        grad_out: Gradient of the output ``[B, H, M, D]``, with the dtype of ``q`` and any strides.
        q: Queries ``[B, H, M, D]``, float32, bfloat16, float16 or float64, with any strides.
        k: Keys ``[B, H, N, D]``, with the dtype of ``q`` and any strides.
        v: Values ``[B, H, N, D]``, with the dtype of ``q`` and any strides.
        out: Attention output ``[B, H, M, D]``.
        lse: Log-sum-exp of the logits ``[B, H, M]``, in at least float32.
        scale: Factor of the logits; ``D ** -0.5`` if it is None.

    Returns:
        Gradients of ``q``, ``k`` and ``v``, with their shapes and dtypes, contiguous.

    Raises:
        TypeError: An argument has another dtype.
        ValueError: An argument has another shape or device.
    """
    return _attention_backward(grad_out, q, k, v, out, lse, scale)


def _check(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None = None,
) -> None:
    check_qkv(q, k, v)
    check_shape("grad_out", grad_out, "BHMD", q.shape)
    check_like("grad_out", grad_out, "q", q)


def _fake(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None = None,
) -> Grads:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _cpu(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None = None,
) -> Grads:
    if q.dtype in (torch.bfloat16, torch.float16) and k.shape[2] <= _FUSED_HALF_TOKENS:
        return reference(grad_out, q, k, v, out, lse, scale)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    # PyTorch's kernel assumes contiguous channels and does not check that they are.
    inputs = map(together, (q, k, v))
    grad_q, grad_k, grad_v = fused(grad_out, *inputs, out, lse, 0.0, False, scale=scale)
    return grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()


def _triton(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None = None,
) -> Grads:
    from ..kernels import attention_backward as kernel
    from ..kernels.launch import takes

    if not takes(q):
        return reference(grad_out, q, k, v, out, lse, scale)
    grads = _fake(grad_out, q, k, v, out, lse)
    grad_out, q, k, v, out = map(near, (grad_out, q, k, v, out))
    delta = torch.empty_like(lse)
    kernel.attention_backward(grad_out, q, k, v, out, lse.contiguous(), *grads, delta, scale_of(q, scale))
    return grads


_attention_backward = define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float? scale=None)"
    " -> (Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast="off",
    reference=reference,
    cpu=_cpu,
    triton=_triton,
)


def _no_second_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("the attention of pruneattn can be differentiated once, not twice")


torch.library.register_autograd("pruneattn::attention_backward", _no_second_backward, lib=LIBRARY)


@register_flop_formula(torch.ops.pruneattn.attention_backward)
def _flops(grad_out: torch.Size, q: torch.Size, k: torch.Size, *_: Any, **__: Any) -> int:
    batch, heads, rows, channels = q
    return 5 * 2 * batch * heads * rows * k[2] * channels  # recomputes the softmax matrix, then four products
