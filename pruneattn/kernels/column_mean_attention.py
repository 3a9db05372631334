"""Column means of the softmax matrix in Triton, from the row statistics that the attention kernel writes.

A program computes a tile of keys of one head, over tiles of queries. The logits are transposed, ``[keys, queries]``, so
one thread sums a column completely: there are no partial sums and no atomics. Rows and columns of extra tokens are not
part of the score, so the 512 patches of 513 tokens fill their tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Config, Launch, choose, strided, tiles_of
from .tiles import LOG2_E, load_row, load_rows, locate, product


def column_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    maximum: torch.Tensor,
    inverse: torch.Tensor,
    sums: torch.Tensor,
    extra_tokens: int,
    scale: float,
) -> None:
    """Write the share of each head in the column means; the sum over heads is the scores.

    Args:
        q: Queries ``[B, H, N, D]``, with any strides and contiguous channels.
        k: Keys ``[B, H, N, D]``, with any strides and contiguous channels.
        maximum: Row statistics ``[B, H, N]``, float32, contiguous, from
            :func:`pruneattn.kernels.attention.attention` with the same scale.
        inverse: Row statistics, like ``maximum``.
        sums: Result ``[B, H, N - extra_tokens]``, float32, contiguous.
        extra_tokens: Number of tokens before the patches.
        scale: Factor of the logits.
    """
    config = choose("column_sums", k, k.shape[2] - extra_tokens)
    launch(q, k, maximum, inverse, sums, extra_tokens, scale, config).run(q)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    maximum: torch.Tensor,
    inverse: torch.Tensor,
    sums: torch.Tensor,
    extra_tokens: int,
    scale: float,
    config: Config,
) -> Launch:
    """Return the launch of :func:`column_sums` with these tile sizes."""
    batch, heads, tokens, channels = q.shape
    patches = tokens - extra_tokens
    return Launch(
        _column_sums,
        (batch * heads * -(-patches // config.BLOCK_N),),
        dict(
            **strided(q=q, k=k),
            maximum=maximum,
            inverse=inverse,
            sums=sums,
            heads=heads,
            patches=patches,
            extra_tokens=extra_tokens,
            scale=scale,
            share=1 / (heads * patches),
            **tiles_of(channels, patches, config.BLOCK_N, patches, config.BLOCK_M),
        ),
        config,
    )


@triton.jit
def _column_sums(
    q,
    q_batch,
    q_head,
    q_row,
    k,
    k_batch,
    k_head,
    k_row,
    maximum,
    inverse,
    sums,
    heads,
    patches,
    extra_tokens,
    scale,
    share,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
    STEP: tl.constexpr,
    APART: tl.constexpr,
    MASKED: tl.constexpr,
):
    tile, head_number, clip, head = locate(patches, heads, BLOCK)
    q += clip * q_batch + head * q_head + extra_tokens * q_row
    k += clip * k_batch + head * k_head + extra_tokens * k_row
    maximum += head_number * (patches + extra_tokens) + extra_tokens
    inverse += head_number * (patches + extra_tokens) + extra_tokens
    sums += head_number * patches
    if LAST == 0 or tile < patches // BLOCK:
        _columns(
            q,
            q_row,
            k,
            k_row,
            maximum,
            inverse,
            sums,
            tile * BLOCK,
            patches,
            scale,
            share,
            D,
            C,
            BLOCK,
            False,
            STEP,
            APART,
            MASKED,
        )
    else:
        _columns(
            q,
            q_row,
            k,
            k_row,
            maximum,
            inverse,
            sums,
            tile * BLOCK,
            patches,
            scale,
            share,
            D,
            C,
            LAST,
            True,
            STEP,
            APART,
            MASKED,
        )


@triton.jit
def _columns(
    q,
    q_row,
    k,
    k_row,
    maximum,
    inverse,
    sums,
    first,
    patches,
    scale,
    share,
    D: tl.constexpr,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    ENDS: tl.constexpr,
    STEP: tl.constexpr,
    APART: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the sums of the columns from ``first`` on."""
    factor = scale * LOG2_E
    keys = load_rows(k, first, patches, k_row, KEYS, ENDS, D, C)  # [KEYS, C]
    acc = tl.zeros([KEYS], tl.float32)
    for query in tl.static_range(APART):
        logits = tl.sum(keys.to(tl.float32) * load_row(q, query, q_row, D, C), 1)
        acc += _weights(logits, tl.load(maximum + query), tl.load(inverse + query), factor)
    whole = APART + (patches - APART) // STEP * STEP
    for start in range(APART, whole, STEP):
        acc += _tile_sums(keys, q, q_row, maximum, inverse, start, patches, factor, D, C, STEP, False)
    if MASKED:
        acc += _tile_sums(keys, q, q_row, maximum, inverse, whole, patches, factor, D, C, STEP, True)
    column = first + tl.arange(0, KEYS)
    tl.store(sums + column, acc * share, mask=column < patches)


@triton.jit
def _tile_sums(
    keys,
    q,
    q_row,
    maximum,
    inverse,
    start,
    patches,
    factor,
    D: tl.constexpr,
    C: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the sums of the columns over the tile of queries at ``start``."""
    row = start + tl.arange(0, STEP)
    inside = row < patches if MASKED else None
    largest = tl.load(maximum + row, mask=inside)[None, :]
    share = tl.load(inverse + row, mask=inside)[None, :]
    logits = product(keys, tl.trans(load_rows(q, start, patches, q_row, STEP, MASKED, D, C)))  # [KEYS, STEP]
    weights = _weights(logits, largest, share, factor)
    if MASKED:
        weights = tl.where(inside[None, :], weights, 0.0)  # type: ignore[index]  # not None if MASKED
    return tl.sum(weights, 1)


@triton.jit
def _weights(logits, largest, share, factor):
    # A recomputed logit may exceed the largest logit by a rounding error: its products are added in another order.
    return tl.exp2(tl.minimum((logits - largest) * factor, 0.0, propagate_nan=tl.PropagateNan.ALL)) * share
