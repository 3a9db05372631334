"""Helpers shared by the attention ops: dtypes of the kernels, argument checks, result buffers, logits."""

from __future__ import annotations

import torch

from ._checks import ATTENTION_DTYPES, check_dtype, check_like, check_not_empty, check_shape

#: Dtypes of the CPU kernels. The CPU computes float16 in float32, and float64 with the reference.
CPU_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
#: Dtypes of the CUDA kernels.
CUDA_DTYPES = {**CPU_DTYPES, torch.float16: "float16"}


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Check the shapes, dtypes and devices of queries, keys and values."""
    check_heads(q, k, v)
    check_dtypes(q, k, v)


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Check the shapes of queries ``[B, H, M, D]``, keys and values ``[B, H, N, D]``."""
    check_shape("q", q, "BHMD")
    check_not_empty("q", q, "BHMD")
    if k.shape != q.shape:
        batch, heads, _, channels = q.shape
        check_shape("k", k, "BHND", (batch, heads, *k.shape[2:3], channels))
        check_not_empty("k", k, "BHND")
    if v.shape != k.shape:
        check_shape("v", v, "BHND", k.shape)


def check_dtypes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Check that queries, keys and values have one floating-point dtype and one device."""
    check_dtype("q", q, ATTENTION_DTYPES)
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)


def empty_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uninitialized ``out`` and ``lse`` for queries ``[B, H, M, D]``.

    ``out`` is ``[B, H, M, D]``, stored as ``[B, M, H, D]``, and ``lse`` is ``[B, H, M]`` in at least float32.
    """
    batch, heads, rows, channels = q.shape
    out = q.new_empty((batch, rows, heads, channels)).transpose(1, 2)
    return out, q.new_empty((batch, heads, rows), dtype=torch.promote_types(q.dtype, torch.float32))


def logits(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Return the scaled products of queries and keys, ``[B, H, M, N]`` in at least float32."""
    return (exact(q) * scale_of(q, scale)) @ exact(k).transpose(-2, -1)


def exact(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in at least float32: a product rounded to half precision could change the ranking of patches."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scale_of(q: torch.Tensor, scale: float | None) -> float:
    """Return the factor of the logits: ``scale``, or ``D ** -0.5`` if it is None."""
    return q.shape[-1] ** -0.5 if scale is None else scale
