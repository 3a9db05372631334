"""Softmax attention without scores, for blocks that do not prune and for the queries of kept tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._attention import CPU_DTYPES, check_dtypes, check_heads, check_qkv, empty_outputs, logits, scale_of
from ._layout import heads_of, near, rows_together
from ._registration import LIBRARY, define
from .attention_backward import attention_backward
from .backend import choose, launch
from .pytorch_attention import pytorch_attention, sdpa


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Define :func:`attention` in plain PyTorch.

    Returns:
        ``out`` ``[B, H, M, D]``, stored as ``[B, M, H, D]``, and the log-sum-exp of the logits, which the gradient
        needs, ``[B, H, M]`` in at least float32.
    """
    return rows_together(sdpa(q, k, v, scale)), logits(q, k, scale).logsumexp(-1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Compute softmax attention, as ``scaled_dot_product_attention`` does without a mask.

    On a CPU, our kernel runs. On other devices PyTorch's attention runs, unless the Triton backend is forced when the
    function is called or compiled. On data-center GPUs since Hopper, PyTorch's attention is cuDNN's for inference in
    half precision, if cuDNN supports the input. Differentiable in ``q``, ``k`` and ``v`` (our kernels: once). Inside
    autocast, the inputs are cast like those of ``scaled_dot_product_attention``.

    Args:
        q: Queries ``[B, H, M, D]``, float32, bfloat16, float16 or float64, with any strides: for example a view of a
            packed qkv projection.
        k: Keys ``[B, H, N, D]``, with the dtype of ``q`` and any strides.
        v: Values ``[B, H, N, D]``, with the dtype of ``q`` and any strides.
        scale: Factor of the logits; ``D ** -0.5`` if it is None.

    Returns:
        Attention output ``[B, H, M, D]`` with the dtype of ``q``. Our kernels store it as ``[B, M, H, D]``, so that
        ``out.transpose(1, 2).flatten(2)`` is a view.

    Raises:
        TypeError: An argument has another dtype.
        ValueError: An argument has another shape or device.
    """
    if _pytorch_is_best(q.device.type):
        check_heads(q, k, v)
        if q.device.type == "meta" or not torch.is_autocast_enabled(q.device.type):  # autocast makes the dtypes equal
            check_dtypes(q, k, v)
        return pytorch_attention(q, k, v, scale)
    return _attention(q, k, v, scale)[0]


@torch.compiler.assume_constant_result
def _pytorch_is_best(device_type: str) -> bool:
    return device_type != "cpu" and choose("attention", device_type) is reference


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> None:
    check_qkv(q, k, v)


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_outputs(q)


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
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


def _triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    from ..kernels import attention as kernel
    from ..kernels.launch import takes

    if not takes(q):
        return reference(q, k, v, scale)
    out, lse = empty_outputs(q)
    kernel.attention(near(q), near(k), near(v), out, lse, scale_of(q, scale))
    return out, lse


_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, float? scale=None) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast="cast",
    # The Triton kernel computes exactly what PyTorch's attention computes, and has not been measured faster.
    only_if_forced=("triton",),
    reference=reference,
    cpu=_cpu,
    triton=_triton,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx: Any, grad_out: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_out is None:
        return None, None, None, None
    q, k, v, out, lse = ctx.saved_tensors
    return *attention_backward(grad_out, q, k, v, out, lse, ctx.scale), None


torch.library.register_autograd("pruneattn::attention", _backward, setup_context=_setup_context, lib=LIBRARY)


@register_flop_formula([torch.ops.pruneattn.attention, torch.ops.pruneattn.pytorch_attention])
def _flops(q: torch.Size, k: torch.Size, *_: Any, **__: Any) -> int:
    batch, heads, rows, channels = q
    return 2 * 2 * batch * heads * rows * k[2] * channels  # two matrix products, a multiplication and an addition
