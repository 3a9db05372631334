"""PyTorch's attention on a GPU, by the fastest of its kernels."""

import functools

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from ._layout import in_pieces, rows_together
from ._registration import LIBRARY

_HALVES = (torch.float16, torch.bfloat16)


def pytorch_attention(q, k, v, scale=None):
    """``scaled_dot_product_attention``, by cuDNN where that is fastest: in half precision, for inference, from Hopper on.

    Whether cuDNN takes the tensors is asked inside the operator ``pruneattn::pytorch_attention``, and so when a compiled
    graph runs, not when it is traced. Exported programs have PyTorch's own operator.
    """
    if _may_be_cudnns(q, k, v, scale):
        return torch.ops.pruneattn.pytorch_attention.default(q, k, v, scale)
    return sdpa(q, k, v, scale)


def sdpa(q, k, v, scale):
    """PyTorch's choice, whose FlashAttention gives NaN for a scale that is not positive."""
    if scale is not None and scale <= 0:
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _may_be_cudnns(q, k, v, scale):
    """By what is known of tensors that are not there, as while a graph is traced."""
    if (
        q.dtype not in _HALVES
        or (scale is not None and scale <= 0)
        or not _cudnn_is_fast(q.device.type, q.device.index)
    ):
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    # Otherwise they are to be cast, which the operators do not do.
    return not torch.is_autocast_enabled(q.device.type) or torch.get_autocast_dtype(q.device.type) == q.dtype


@torch.compiler.assume_constant_result
def _cudnn_is_fast(device_type, index):
    return device_type == "cuda" and not torch.compiler.is_exporting() and _leaves_room_for_flash_2(index)


@functools.cache
def _leaves_room_for_flash_2(index):
    """Where FlashAttention 2, which PyTorch brings, leaves part of the GPU unused."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index)[0] in (9, 10)


def _cudnn_takes(q, k, v):
    fits = all(x.dtype == q.dtype and x.device == q.device and x.ndim == 4 and in_pieces(x) for x in (q, k, v))
    return fits and k.shape == v.shape and can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, False, False))


def _cudnn(q, k, v, scale):
    # By its operator: `sdpa_kernel` would change what the whole process prefers, other threads included, and undo what it
    # was told from outside.
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=scale)[0]


LIBRARY.define(
    "pytorch_attention(Tensor q, Tensor k, Tensor v, float? scale=None) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


def _run(q, k, v, scale=None):
    out = (_cudnn if _cudnn_takes(q, k, v) else sdpa)(q, k, v, scale)
    return out if out.transpose(1, 2).is_contiguous() else rows_together(out)


def _fake(q, k, v, scale=None):
    batch, heads, rows, channels = q.shape
    return q.new_empty((batch, rows, heads, channels)).transpose(1, 2)


LIBRARY.impl("pytorch_attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("pruneattn::pytorch_attention", _fake, lib=LIBRARY)
