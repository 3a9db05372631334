"""Scores of patches by the attention that the class token pays to them (the paper's score for AST)."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._attention import CPU_DTYPES, CUDA_DTYPES, scale_of
from ._checks import ATTENTION_DTYPES, check_dtype, check_extra_tokens, check_like, check_not_empty, check_shape
from ._layout import heads_of, near
from ._registration import LIBRARY, define
from .backend import _C, launch


def reference(q_cls: torch.Tensor, k: torch.Tensor, extra_tokens: int, scale: float | None = None) -> torch.Tensor:
    """Define :func:`cls_scores` in plain PyTorch."""
    exact = torch.promote_types(k.dtype, torch.float32)  # products are never rounded to half precision
    logits = (k.to(exact) @ q_cls.to(exact).unsqueeze(-1)).squeeze(-1) * scale_of(q_cls, scale)  # [B, H, N]
    return logits.softmax(-1)[:, :, extra_tokens:].mean(1).float().detach()  # [B, N - extra_tokens]


def cls_scores(q_cls: torch.Tensor, k: torch.Tensor, extra_tokens: int, scale: float | None = None) -> torch.Tensor:
    """Compute the class token's row of the softmax matrix, averaged over heads (paper, eq. 2b).

    The scores are computed in float32 from the first accumulation, also for half-precision inputs. For float64 inputs
    they are computed in float64, then rounded. Inside autocast, the inputs are cast like those of
    ``scaled_dot_product_attention``. Not differentiable.

    Args:
        q_cls: Queries of the class token ``[B, H, D]``, float32, bfloat16, float16 or float64, with any strides.
        k: Keys of all tokens ``[B, H, N, D]``, with the dtype of ``q_cls`` and any strides.
        extra_tokens: Number of tokens before the patches. They are part of the softmax but get no score.
        scale: Factor of the logits; ``D ** -0.5`` if it is None.

    Returns:
        Scores ``[B, N - extra_tokens]``, float32.

    Raises:
        TypeError: An argument has another dtype.
        ValueError: An argument has another shape, range or device.
    """
    return _cls_scores(q_cls, k, extra_tokens, scale)


def check_scoring(q_cls: torch.Tensor, k: torch.Tensor, extra_tokens: int, scale: float | None = None) -> None:
    """Check the arguments of :func:`cls_scores`."""
    check_shape("k", k, "BHND")
    batch, heads, tokens, channels = k.shape
    check_shape("q_cls", q_cls, "BHD", (batch, heads, channels))
    check_dtype("q_cls", q_cls, ATTENTION_DTYPES)
    check_like("k", k, "q_cls", q_cls)
    check_not_empty("k", k, "BHND")
    check_extra_tokens(extra_tokens, tokens)


def _fake(q_cls: torch.Tensor, k: torch.Tensor, extra_tokens: int, scale: float | None = None) -> torch.Tensor:
    return k.new_empty((k.shape[0], k.shape[2] - extra_tokens), dtype=torch.float32)


def cpu_scores(q_cls: torch.Tensor, k: torch.Tensor, extra_tokens: int, scale: float | None = None) -> torch.Tensor:
    """Run :func:`cls_scores` with the CPU kernel, or with the reference for dtypes without a kernel."""
    if k.dtype == torch.float64:
        return reference(q_cls, k, extra_tokens, scale)
    if k.dtype == torch.float16:
        return cpu_scores(q_cls.float(), k.float(), extra_tokens, scale)
    scores = _fake(q_cls, k, extra_tokens)
    (q, q_heads), (k, k_heads) = heads_of(q_cls.unsqueeze(2)), heads_of(k)
    places = (q_heads, k_heads)
    launch("cls_scores", q, CPU_DTYPES[k.dtype], *k.shape, *places, scale_of(q, scale), extra_tokens, scores.data_ptr())
    return scores


def cuda_partials(q_cls: torch.Tensor, k: torch.Tensor, extra_tokens: int, scale: float | None = None) -> torch.Tensor:
    """Compute rows ``[B, R, P]`` in float32 whose sum over R is the scores.

    The CUDA kernel writes one row per head. The reference replaces it for inputs that it does not support.
    """
    batch, heads, tokens, _ = k.shape
    if k.dtype not in CUDA_DTYPES or tokens > _C.MAX_TOKENS:
        return reference(q_cls, k, extra_tokens, scale).unsqueeze(1)
    partials = k.new_empty((batch, heads, tokens - extra_tokens), dtype=torch.float32)
    (q, q_heads), (k, k_heads) = heads_of(q_cls.unsqueeze(2)), heads_of(k)
    dtype, scale = CUDA_DTYPES[k.dtype], scale_of(q, scale)
    launch("cls_scores", q, dtype, *k.shape, q_heads, k_heads, scale, extra_tokens, partials.data_ptr())
    return partials


def triton_partials(
    q_cls: torch.Tensor, k: torch.Tensor, extra_tokens: int, scale: float | None = None
) -> torch.Tensor:
    """Compute the rows of :func:`cuda_partials` with the Triton kernel."""
    from ..kernels import cls_scores as kernel
    from ..kernels.launch import takes

    if not takes(k):
        return reference(q_cls, k, extra_tokens, scale).unsqueeze(1)
    weights = k.new_empty(k.shape[:3], dtype=torch.float32)  # [B, H, N]
    kernel.cls_weights(near(q_cls.unsqueeze(2)), near(k), weights, scale_of(q_cls, scale))
    return weights[:, :, extra_tokens:]


def _cuda(q_cls: torch.Tensor, k: torch.Tensor, extra_tokens: int, scale: float | None = None) -> torch.Tensor:
    return cuda_partials(q_cls, k, extra_tokens, scale).sum(1)


def _triton(q_cls: torch.Tensor, k: torch.Tensor, extra_tokens: int, scale: float | None = None) -> torch.Tensor:
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


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _backward(ctx: Any, grad: Any) -> tuple[None, ...]:
    return None, None, None, None


torch.library.register_autograd("pruneattn::cls_scores", _backward, setup_context=_setup_context, lib=LIBRARY)


@register_flop_formula(torch.ops.pruneattn.cls_scores)
def flops(q_cls: torch.Size, k: torch.Size, *_: Any, **__: Any) -> int:
    """Return the FLOPs of the op for keys of this shape."""
    batch, heads, tokens, channels = k
    return 2 * batch * heads * tokens * channels
