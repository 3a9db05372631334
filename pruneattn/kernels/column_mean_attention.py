"""Column means of the softmax matrix in Triton, from the statistics of its rows that attention leaves behind.

A program has some keys of a head and goes through the queries in tiles, with the logits transposed, ``[keys, queries]``:
so a column is summed within a thread, and is whole at the end. No partial sums, no atomics. Rows and columns of extra
tokens are no part of the score, so that the 512 patches of 513 tokens are whole tiles.
"""

import triton
import triton.language as tl

from .launch import Launch, choose, strided, tiles_of
from .tiles import LOG2_E, load_row, load_rows, locate, product


def column_sums(q, k, maximum, inverse, sums, extra_tokens, scale):
    """Write each head's share of the column means into ``sums`` float32 ``[B, H, N - extra_tokens]``: add up its heads.

    ``q`` and ``k`` ``[B, H, N, D]``: any strides with contiguous channels. ``maximum`` and ``inverse`` float32
    ``[B, H, N]``, of :func:`pruneattn.kernels.attention.attention` with the same scale.
    """
    config = choose("column_sums", k, k.shape[2] - extra_tokens)
    launch(q, k, maximum, inverse, sums, extra_tokens, scale, config).run(q)


def launch(q, k, maximum, inverse, sums, extra_tokens, scale, config):
    """The launch of :func:`column_sums` with these tile sizes."""
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
    """Sums of the columns from ``first`` on."""
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
    """Sums of the columns over the queries from ``start`` on."""
    row = start + tl.arange(0, STEP)
    inside = row < patches if MASKED else None
    largest = tl.load(maximum + row, mask=inside)[None, :]
    share = tl.load(inverse + row, mask=inside)[None, :]
    logits = product(keys, tl.trans(load_rows(q, start, patches, q_row, STEP, MASKED, D, C)))  # [KEYS, STEP]
    weights = _weights(logits, largest, share, factor)
    if MASKED:
        weights = tl.where(inside[None, :], weights, 0.0)
    return tl.sum(weights, 1)


@triton.jit
def _weights(logits, largest, share, factor):
    # A logit computed a second time, in another order, may exceed the largest one of the first time by a rounding error.
    return tl.exp2(tl.minimum((logits - largest) * factor, 0.0, propagate_nan=tl.PropagateNan.ALL)) * share
