"""Attention in Triton: a program computes a tile of query rows of one head, over tiles of keys (online softmax)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Config, Launch, choose, strided, tiles_of
from .tiles import LOG2_E, load_row, load_rows, locate, product, store_rows

# A scale of 0 would turn the -Inf of masked keys into NaN.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    maximum: torch.Tensor | None = None,
    inverse: torch.Tensor | None = None,
) -> None:
    """Write softmax attention into ``out``, and the log-sum-exp of the logits into ``lse``.

    Args:
        q: Queries ``[B, H, M, D]``, with any strides and contiguous channels.
        k: Keys ``[B, H, N, D]``, with any strides and contiguous channels.
        v: Values ``[B, H, N, D]``, with any strides and contiguous channels.
        out: Attention output ``[B, H, M, D]``, with any strides and contiguous channels.
        lse: Log-sum-exp ``[B, H, M]``, float32, contiguous.
        scale: Factor of the logits.
        maximum: Optional result ``[B, H, M]``, float32, contiguous: the product of query and key that has the largest
            logit of each row.
        inverse: Optional result like ``maximum``, given with it: one over the sum of
            ``exp(scale * (product - maximum))``. Both together give the softmax weights of a row also for large logits,
            whose log-sum-exp is too coarse.
    """
    launch(q, k, v, out, lse, scale, maximum, inverse, choose("attention", q, q.shape[2])).run(q)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    maximum: torch.Tensor | None,
    inverse: torch.Tensor | None,
    config: Config,
) -> Launch:
    """Return the launch of :func:`attention` with these tile sizes."""
    batch, heads, rows, channels = q.shape
    keys = k.shape[2]
    return Launch(
        _attention,
        (batch * heads * -(-rows // config.BLOCK_M),),
        dict(
            **strided(q=q, k=k, v=v, out=out),
            lse=lse,
            maximum=maximum,
            inverse=inverse,
            heads=heads,
            rows=rows,
            keys=keys,
            scale=max(abs(scale), _SMALLEST_SCALE),
            NEGATIVE=scale < 0,
            **tiles_of(channels, rows, config.BLOCK_M, keys, config.BLOCK_N),
        ),
        config,
    )


@triton.jit
def _attention(
    q,
    q_batch,
    q_head,
    q_row,
    k,
    k_batch,
    k_head,
    k_row,
    v,
    v_batch,
    v_head,
    v_row,
    out,
    out_batch,
    out_head,
    out_row,
    lse,
    maximum,
    inverse,
    heads,
    rows,
    keys,
    scale,
    NEGATIVE: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
    STEP: tl.constexpr,
    APART: tl.constexpr,
    MASKED: tl.constexpr,
):
    tile, head_number, clip, head = locate(rows, heads, BLOCK)
    q += clip * q_batch + head * q_head
    k += clip * k_batch + head * k_head
    v += clip * v_batch + head * v_head
    out += clip * out_batch + head * out_head
    lse += head_number * rows
    if maximum is not None:
        maximum += head_number * rows
        inverse += head_number * rows
    if LAST == 0 or tile < rows // BLOCK:
        _rows(
            q,
            q_row,
            k,
            k_row,
            v,
            v_row,
            out,
            out_row,
            lse,
            maximum,
            inverse,
            tile * BLOCK,
            rows,
            keys,
            scale,
            NEGATIVE,
            D,
            C,
            BLOCK,
            False,
            STEP,
            APART,
            MASKED,
        )
    else:
        _rows(
            q,
            q_row,
            k,
            k_row,
            v,
            v_row,
            out,
            out_row,
            lse,
            maximum,
            inverse,
            tile * BLOCK,
            rows,
            keys,
            scale,
            NEGATIVE,
            D,
            C,
            LAST,
            True,
            STEP,
            APART,
            MASKED,
        )


@triton.jit
def _rows(
    q,
    q_row,
    k,
    k_row,
    v,
    v_row,
    out,
    out_row,
    lse,
    maximum,
    inverse,
    first,
    rows,
    keys,
    scale,
    NEGATIVE: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    ENDS: tl.constexpr,
    STEP: tl.constexpr,
    APART: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the output and log-sum-exp of the query rows from ``first`` on."""
    factor = scale * LOG2_E
    queries = load_rows(q, first, rows, q_row, ROWS, ENDS, D, C)  # [ROWS, C]
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, C], tl.float32)
    for key in tl.static_range(APART):
        logits = tl.sum(queries.to(tl.float32) * load_row(k, key, k_row, D, C), 1)[:, None]
        largest, weights, old = _rescale(largest, logits, factor, NEGATIVE)
        mass = mass * old + tl.sum(weights, 1)
        acc = acc * old[:, None] + weights * load_row(v, key, v_row, D, C)
    whole = APART + (keys - APART) // STEP * STEP
    for start in range(APART, whole, STEP):
        largest, mass, acc = _add_tile(
            queries, k, k_row, v, v_row, start, keys, largest, mass, acc, factor, NEGATIVE, D, C, STEP, False
        )
    if MASKED:
        largest, mass, acc = _add_tile(
            queries, k, k_row, v, v_row, whole, keys, largest, mass, acc, factor, NEGATIVE, D, C, STEP, True
        )
    share = 1 / mass
    store_rows(out, acc * share[:, None], first, rows, out_row, ROWS, D, C)
    row = first + tl.arange(0, ROWS)
    tl.store(lse + row, (largest * factor + tl.log2(mass)) / LOG2_E, mask=row < rows)
    if maximum is not None:
        tl.store(maximum + row, -largest if NEGATIVE else largest, mask=row < rows)
        tl.store(inverse + row, share, mask=row < rows)


@triton.jit
def _add_tile(
    queries,
    k,
    k_row,
    v,
    v_row,
    start,
    keys,
    largest,
    mass,
    acc,
    factor,
    NEGATIVE: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the running maximum, sum and output of the rows after the tile of keys at ``start``."""
    logits = product(queries, tl.trans(load_rows(k, start, keys, k_row, STEP, MASKED, D, C)))  # [ROWS, STEP]
    if MASKED:
        inside = start + tl.arange(0, STEP) < keys
        logits = tl.where(inside[None, :], logits, float("inf") if NEGATIVE else float("-inf"))
    largest, weights, old = _rescale(largest, logits, factor, NEGATIVE)
    values = load_rows(v, start, keys, v_row, STEP, MASKED, D, C)
    mass = mass * old + tl.sum(weights, 1)
    return largest, mass, acc * old[:, None] + product(weights.to(values.dtype), values)


@triton.jit
def _rescale(largest, logits, factor, NEGATIVE: tl.constexpr):
    """Return the new largest logit of each row, the exponentials of the tile, and the factor of the previous sums."""
    if NEGATIVE:  # the maximum is taken before scaling
        logits = -logits
    new = tl.maximum(largest, tl.max(logits, 1))
    # A row that has only seen -Inf must not become NaN before its last tile.
    finite = tl.where(new == float("-inf"), 0.0, new)
    # Subtracting before scaling is exact for the largest logits of any size.
    return new, tl.exp2((logits - finite[:, None]) * factor), tl.exp2((largest - finite) * factor)
