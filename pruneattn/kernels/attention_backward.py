"""Gradients of attention in Triton, from its output and log-sum-exp.

One kernel computes the gradients of the queries, a second one those of keys and values. Both recompute the softmax
matrix tile by tile. One program computes each sum, so there are no atomics.
"""

from __future__ import annotations

import torch

from .attention_backward_keys import launch as launch_keys
from .attention_backward_queries import launch as launch_queries
from .launch import choose


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
) -> None:
    """Write the gradients of queries, keys and values.

    Args:
        grad_out: Gradient of the output ``[B, H, M, D]``, with any strides and contiguous channels.
        q: Queries ``[B, H, M, D]``, with any strides and contiguous channels.
        k: Keys ``[B, H, N, D]``, with any strides and contiguous channels.
        v: Values ``[B, H, N, D]``, with any strides and contiguous channels.
        out: Attention output ``[B, H, M, D]``, with any strides and contiguous channels.
        lse: Log-sum-exp of the logits ``[B, H, M]``, float32, contiguous.
        grad_q: Result ``[B, H, M, D]``, with any strides and contiguous channels.
        grad_k: Result ``[B, H, N, D]``, with any strides and contiguous channels.
        grad_v: Result ``[B, H, N, D]``, with any strides and contiguous channels.
        delta: Scratch ``[B, H, M]``, float32, contiguous.
        scale: Factor of the logits.
    """
    by_queries, by_keys = choose("grad_queries", q, q.shape[2]), choose("grad_keys", k, k.shape[2])
    launch_queries(grad_out, q, k, v, out, lse, grad_q, delta, scale, by_queries).run(q)
    launch_keys(grad_out, q, k, v, lse, grad_k, grad_v, delta, scale, by_keys).run(q)
