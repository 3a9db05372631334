"""The class token's row of the softmax matrix in Triton: a program reads the keys of a head once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Config, Launch, choose, strided
from .tiles import LOG2_E, block_channels, load_rows, power_of_two


def cls_weights(q_cls: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, scale: float) -> None:
    """Write the share of each head in the scores of all tokens; the sum over heads is the scores.

    Args:
        q_cls: Queries of the class token ``[B, H, 1, D]``, with any strides and contiguous channels.
        k: Keys ``[B, H, N, D]``, with any strides and contiguous channels.
        weights: Result ``[B, H, N]``, float32, contiguous.
        scale: Factor of the logits.
    """
    launch(q_cls, k, weights, scale, choose("cls_weights", k, 1)).run(k)


def launch(q_cls: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, scale: float, config: Config) -> Launch:
    """Return the launch of :func:`cls_weights` with these tile sizes."""
    batch, heads, keys, channels = k.shape
    return Launch(
        _cls_weights,
        (batch * heads,),
        dict(
            **strided(q=q_cls, k=k),
            weights=weights,
            heads=heads,
            keys=keys,
            scale=scale,
            D=channels,
            C=block_channels(channels),
            BLOCK_N=config.BLOCK_N,
            KEYS=max(16, power_of_two(keys)),
        ),
        config,
    )


@triton.jit
def _cls_weights(
    q,
    q_batch,
    q_head,
    q_row,
    k,
    k_batch,
    k_head,
    k_row,
    weights,
    heads,
    keys,
    scale,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
):
    head_number = tl.program_id(0).to(tl.int64)
    clip, head = head_number // heads, head_number % heads
    k += clip * k_batch + head * k_head
    weights += head_number * keys
    channel = tl.arange(0, C)
    query = tl.load(q + clip * q_batch + head * q_head + channel, mask=channel < D, other=0.0).to(tl.float32)
    for start in range(0, keys, BLOCK_N):
        tile = load_rows(k, start, keys, k_row, BLOCK_N, True, D, C)  # [BLOCK_N, C]
        key = start + tl.arange(0, BLOCK_N)
        tl.store(weights + key, tl.sum(tile.to(tl.float32) * query[None, :], 1) * scale * LOG2_E, mask=key < keys)
    tl.debug_barrier()  # other threads than those that wrote the logits read them
    key = tl.arange(0, KEYS)
    logits = tl.load(weights + key, mask=key < keys, other=float("-inf"))
    exponentials = tl.exp2(logits - tl.max(logits, 0))
    tl.store(weights + key, exponentials / (tl.sum(exponentials, 0) * heads), mask=key < keys)
