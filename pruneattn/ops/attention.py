"""Softmax attention without a score: for unpruned blocks, and for the queries of kept rows alone."""

import torch
from torch.utils.flop_counter import register_flop_formula

from ._checks import ATTENTION_DTYPES, check_dtype, check_like, check_not_empty, check_shape
from ._layout import heads_of, near, rows_together, together
from ._registration import LIBRARY, define
from .backend import choose, launch
from .pytorch_attention import pytorch_attention, sdpa

#: What the CPU kernels compute; float16 is computed in float32 there, and float64 by the reference.
CPU_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
#: And the CUDA kernels.
CUDA_DTYPES = {**CPU_DTYPES, torch.float16: "float16"}

# In half precision PyTorch's fused backward pass is slow for few tokens: 12 ms where the recomputation takes 4 (65
# tokens, 96 heads, bfloat16, 2 threads); at 257 tokens they draw level.
_FUSED_HALF_TOKENS = 256


def reference(q, k, v, scale=None):
    """The definition of :func:`attention` in plain PyTorch, with the log-sum-exp of the logits that its gradient needs.

    Returns ``out [B, H, M, D]``, stored as ``[B, M, H, D]``, and ``lse [B, H, M]`` in at least float32.
    """
    return rows_together(sdpa(q, k, v, scale)), logits(q, k, scale).logsumexp(-1)


def backward_reference(grad_out, q, k, v, out, lse, scale=None):
    """Gradients of the attention output with respect to q, k and v."""
    weights = (logits(q, k, scale) - lse.unsqueeze(-1)).exp()  # [B, H, M, N]
    grad_v = weights.to(v.dtype).transpose(-2, -1) @ grad_out  # [B, H, N, D]
    grad_weights = exact(grad_out) @ exact(v).transpose(-2, -1)  # [B, H, M, N]
    centred = grad_weights - (exact(grad_out) * exact(out)).sum(-1, keepdim=True)
    grad_logits = (weights * centred * scale_of(q, scale)).to(q.dtype)
    return grad_logits @ k, grad_logits.transpose(-2, -1) @ q, grad_v


def logits(q, k, scale):
    """``[B, H, M, N]`` in at least float32."""
    return (exact(q) * scale_of(q, scale)) @ exact(k).transpose(-2, -1)


def exact(x):
    """In at least float32: a product rounded to half precision would already change the ranking."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scale_of(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


def attention(q, k, v, scale=None):
    """Softmax attention, as ``scaled_dot_product_attention`` without a mask.

    On a CPU it runs our kernel; elsewhere PyTorch's, unless Triton is forced (when the call is compiled, if it is). On
    the GPUs of data centres from Hopper on, this is cuDNN's where it takes the input, in half precision and for inference.
    Differentiable in q, k and v (by our kernels once). Inside autocast, the inputs are cast as those of
    ``scaled_dot_product_attention`` are.

    Args:
        q: queries ``[B, H, M, D]``, floating point, any strides: views of a packed qkv are meant.
        k, v: keys and values ``[B, H, N, D]``, dtype of ``q``, any strides.
        scale: factor of the logits; ``D ** -0.5`` if not given.

    Returns:
        ``[B, H, M, D]``, dtype of q. Of our kernels stored as ``[B, M, H, D]``: ``out.transpose(1, 2).flatten(2)`` is a
        view.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than said here.
    """
    if _pytorch_is_best(q.device.type):
        check_heads(q, k, v)
        if q.device.type == "meta" or not torch.is_autocast_enabled(q.device.type):  # which casts them
            check_dtypes(q, k, v)
        return pytorch_attention(q, k, v, scale)
    return _attention(q, k, v, scale)[0]


@torch.compiler.assume_constant_result
def _pytorch_is_best(device_type):
    return device_type != "cpu" and choose("attention", device_type) is reference


def check_qkv(q, k, v):
    """Raise unless these are queries, keys and values of one dtype and device."""
    check_heads(q, k, v)
    check_dtypes(q, k, v)


def check_heads(q, k, v):
    """Raise unless these have the shapes of queries, keys and values."""
    check_shape("q", q, "BHMD")
    check_not_empty("q", q, "BHMD")
    if k.shape != q.shape:
        batch, heads, _, channels = q.shape
        check_shape("k", k, "BHND", (batch, heads, *k.shape[2:3], channels))
        check_not_empty("k", k, "BHND")
    if v.shape != k.shape:
        check_shape("v", v, "BHND", k.shape)


def check_dtypes(q, k, v):
    """Raise unless these have one dtype, one that attention is for, and one device."""
    check_dtype("q", q, ATTENTION_DTYPES)
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)


def _check(q, k, v, scale=None):
    check_qkv(q, k, v)


def _check_backward(grad_out, q, k, v, out, lse, scale=None):
    check_qkv(q, k, v)
    check_shape("grad_out", grad_out, "BHMD", q.shape)
    check_like("grad_out", grad_out, "q", q)


def empty_outputs(q):
    """Uninitialised ``out`` and ``lse`` for these queries."""
    batch, heads, rows, channels = q.shape
    out = q.new_empty((batch, rows, heads, channels)).transpose(1, 2)
    return out, q.new_empty((batch, heads, rows), dtype=torch.promote_types(q.dtype, torch.float32))


def _fake(q, k, v, scale=None):
    return empty_outputs(q)


def _fake_backward(grad_out, q, k, v, out, lse, scale=None):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _cpu(q, k, v, scale=None):
    if q.dtype == torch.float64:
        return reference(q, k, v, scale)
    if q.dtype == torch.float16:
        out, lse = _cpu(q.float(), k.float(), v.float(), scale)
        return out.half(), lse
    out, lse = empty_outputs(q)
    (q, q_heads), (k, k_heads), (v, v_heads) = map(heads_of, (q, k, v))
    shape = (*q.shape[:3], k.shape[2], q.shape[3])
    places = (q_heads, k_heads, v_heads, heads_of(out)[1], lse.data_ptr())
    launch("attention", q, CPU_DTYPES[q.dtype], *shape, *places, scale_of(q, scale))
    return out, lse


def _cpu_backward(grad_out, q, k, v, out, lse, scale=None):
    if q.dtype in (torch.bfloat16, torch.float16) and k.shape[2] <= _FUSED_HALF_TOKENS:
        return backward_reference(grad_out, q, k, v, out, lse, scale)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    # It takes channels that lie apart for contiguous ones.
    grads = fused(grad_out, *map(together, (q, k, v)), out, lse, 0.0, False, scale=scale)
    return tuple(grad.contiguous() for grad in grads)


def _triton(q, k, v, scale=None):
    from ..kernels import attention as kernel
    from ..kernels.launch import takes

    if not takes(q):
        return reference(q, k, v, scale)
    out, lse = empty_outputs(q)
    kernel.attention(*map(near, (q, k, v)), out, lse, scale_of(q, scale))
    return out, lse


def _triton_backward(grad_out, q, k, v, out, lse, scale=None):
    from ..kernels import attention_backward as kernel
    from ..kernels.launch import takes

    if not takes(q):
        return backward_reference(grad_out, q, k, v, out, lse, scale)
    grads = _fake_backward(grad_out, q, k, v, out, lse)
    inputs = map(near, (grad_out, q, k, v, out))
    kernel.attention_backward(*inputs, lse.contiguous(), *grads, torch.empty_like(lse), scale_of(q, scale))
    return grads


# Where SDPA has not been measured beside it, a kernel that only does what SDPA does waits until it is asked for.
_triton.only_if_forced = True

_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, float? scale=None) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast="cast",
    reference=reference,
    cpu=_cpu,
    triton=_triton,
)
attention_backward = define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float? scale=None)"
    " -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    autocast="off",
    reference=backward_reference,
    cpu=_cpu_backward,
    triton=_triton_backward,
)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return None, None, None, None
    return *attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


def _no_second_backward(ctx, *grads):
    raise NotImplementedError("the attention of pruneattn can be differentiated once, not twice")


torch.library.register_autograd("pruneattn::attention", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("pruneattn::attention_backward", _no_second_backward, lib=LIBRARY)


@register_flop_formula([torch.ops.pruneattn.attention, torch.ops.pruneattn.pytorch_attention])
def _flops(q, k, *_, **__):
    batch, heads, rows, channels = q
    return 2 * 2 * batch * heads * rows * k[2] * channels  # two matrix products, a multiplication and an addition


@register_flop_formula(torch.ops.pruneattn.attention_backward)
def _backward_flops(grad_out, q, k, *_, **__):
    batch, heads, rows, channels = q
    return 5 * 2 * batch * heads * rows * k[2] * channels  # the softmax matrix again, then four products
