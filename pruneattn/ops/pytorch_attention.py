"""PyTorch's attention on a GPU, with its fastest kernel for the input."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from ._layout import in_pieces, rows_together
from ._registration import LIBRARY

_HALVES = (torch.float16, torch.bfloat16)


def pytorch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Call ``scaled_dot_product_attention``, or cuDNN's attention where it is faster.

    cuDNN is faster in half precision, for inference, on data-center GPUs since Hopper. The operator
    ``pruneattn::pytorch_attention`` asks cuDNN whether it supports the tensors, so a compiled graph asks when it runs,
    not when it is traced. Exported programs contain PyTorch's own operator.

    Args:
        q: Queries ``[B, H, M, D]``.
        k: Keys ``[B, H, N, D]``, with the dtype of ``q``.
        v: Values ``[B, H, N, D]``, with the dtype of ``q``.
        scale: Factor of the logits; ``D ** -0.5`` if it is None.

    Returns:
        Attention output ``[B, H, M, D]`` with the dtype of ``q``.
    """
    if _may_be_cudnns(q, k, v, scale):
        return torch.ops.pruneattn.pytorch_attention.default(q, k, v, scale)
    return sdpa(q, k, v, scale)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Call ``scaled_dot_product_attention`` without its NaN where FlashAttention gets a scale that is not positive."""
    if scale is not None and scale <= 0:
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _may_be_cudnns(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> bool:
    """Return whether cuDNN may be faster, from properties that fake tensors also have."""
    if (
        q.dtype not in _HALVES
        or (scale is not None and scale <= 0)
        or not _cudnn_is_fast(q.device.type, q.device.index)
    ):
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    # The operators do not cast, so the tensors must already have the dtype of autocast.
    return not torch.is_autocast_enabled(q.device.type) or torch.get_autocast_dtype(q.device.type) == q.dtype


@torch.compiler.assume_constant_result
def _cudnn_is_fast(device_type: str, index: int | None) -> bool:
    return device_type == "cuda" and not torch.compiler.is_exporting() and _leaves_room_for_flash_2(index)


@functools.cache
def _leaves_room_for_flash_2(index: int | None) -> bool:
    """Return whether FlashAttention 2, which PyTorch contains, cannot use the whole GPU."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index)[0] in (9, 10)


def _cudnn_takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    fits = all(x.dtype == q.dtype and x.device == q.device and x.ndim == 4 and in_pieces(x) for x in (q, k, v))
    return fits and k.shape == v.shape and can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, False, False))


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    # `sdpa_kernel` would change the preferences of the whole process, other threads included, and override those of the
    # user. So this calls cuDNN's operator.
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=scale)[0]


LIBRARY.define(
    "pytorch_attention(Tensor q, Tensor k, Tensor v, float? scale=None) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


def _run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    out = (_cudnn if _cudnn_takes(q, k, v) else sdpa)(q, k, v, scale)
    return out if out.transpose(1, 2).is_contiguous() else rows_together(out)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    batch, heads, rows, channels = q.shape
    return q.new_empty((batch, rows, heads, channels)).transpose(1, 2)


LIBRARY.impl("pytorch_attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("pruneattn::pytorch_attention", _fake, lib=LIBRARY)
