"""Gradients of the queries of attention in Triton: a program computes a tile of query rows of one head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Config, Launch, strided, tiles_of
from .tiles import LOG2_E, load_row, load_rows, locate, product, store_rows


def launch(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_q: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    config: Config,
) -> Launch:
    """Return the launch that writes ``grad_q``, and ``delta`` for the next launch, with these tile sizes."""
    batch, heads, rows, channels = q.shape
    keys = k.shape[2]
    return Launch(
        _grad_queries,
        (batch * heads * -(-rows // config.BLOCK_M),),
        dict(
            **strided(grad_out=grad_out, q=q, k=k, v=v, out=out, grad_q=grad_q),
            lse=lse,
            delta=delta,
            heads=heads,
            rows=rows,
            keys=keys,
            scale=scale,
            **tiles_of(channels, rows, config.BLOCK_M, keys, config.BLOCK_N),
        ),
        config,
    )


@triton.jit
def _grad_queries(
    grad_out,
    grad_out_batch,
    grad_out_head,
    grad_out_row,
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
    grad_q,
    grad_q_batch,
    grad_q_head,
    grad_q_row,
    lse,
    delta,
    heads,
    rows,
    keys,
    scale,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
    STEP: tl.constexpr,
    APART: tl.constexpr,
    MASKED: tl.constexpr,
):
    tile, head_number, clip, head = locate(rows, heads, BLOCK)
    grad_out += clip * grad_out_batch + head * grad_out_head
    q += clip * q_batch + head * q_head
    k += clip * k_batch + head * k_head
    v += clip * v_batch + head * v_head
    out += clip * out_batch + head * out_head
    grad_q += clip * grad_q_batch + head * grad_q_head
    lse += head_number * rows
    delta += head_number * rows
    if LAST == 0 or tile < rows // BLOCK:
        _query_rows(
            grad_out,
            grad_out_row,
            q,
            q_row,
            k,
            k_row,
            v,
            v_row,
            out,
            out_row,
            grad_q,
            grad_q_row,
            lse,
            delta,
            tile * BLOCK,
            rows,
            keys,
            scale,
            D,
            C,
            BLOCK,
            False,
            STEP,
            APART,
            MASKED,
        )
    else:
        _query_rows(
            grad_out,
            grad_out_row,
            q,
            q_row,
            k,
            k_row,
            v,
            v_row,
            out,
            out_row,
            grad_q,
            grad_q_row,
            lse,
            delta,
            tile * BLOCK,
            rows,
            keys,
            scale,
            D,
            C,
            LAST,
            True,
            STEP,
            APART,
            MASKED,
        )


@triton.jit
def _query_rows(
    grad_out,
    grad_out_row,
    q,
    q_row,
    k,
    k_row,
    v,
    v_row,
    out,
    out_row,
    grad_q,
    grad_q_row,
    lse,
    delta,
    first,
    rows,
    keys,
    scale,
    D: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    ENDS: tl.constexpr,
    STEP: tl.constexpr,
    APART: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the gradients of the query rows from ``first`` on."""
    factor = scale * LOG2_E
    row = first + tl.arange(0, ROWS)
    queries = load_rows(q, first, rows, q_row, ROWS, ENDS, D, C)  # [ROWS, C]
    grads = load_rows(grad_out, first, rows, grad_out_row, ROWS, ENDS, D, C)
    outs = load_rows(out, first, rows, out_row, ROWS, ENDS, D, C)
    norm = tl.load(lse + row, mask=row < rows, other=0.0)[:, None] * LOG2_E
    center = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + row, center, mask=row < rows)
    center = center[:, None]
    acc = tl.zeros([ROWS, C], tl.float32)
    for key in tl.static_range(APART):
        key_row = load_row(k, key, k_row, D, C)
        logits = tl.sum(queries.to(tl.float32) * key_row, 1)[:, None]
        grad_weights = tl.sum(grads.to(tl.float32) * load_row(v, key, v_row, D, C), 1)[:, None]
        acc += tl.exp2(logits * factor - norm) * (grad_weights - center) * key_row
    whole = APART + (keys - APART) // STEP * STEP
    for start in range(APART, whole, STEP):
        acc += _tile_grad(queries, grads, norm, center, k, k_row, v, v_row, start, keys, factor, D, C, STEP, False)
    if MASKED:
        acc += _tile_grad(queries, grads, norm, center, k, k_row, v, v_row, whole, keys, factor, D, C, STEP, True)
    store_rows(grad_q, acc * scale, first, rows, grad_q_row, ROWS, D, C)


@triton.jit
def _tile_grad(
    queries,
    grads,
    norm,
    center,
    k,
    k_row,
    v,
    v_row,
    start,
    keys,
    factor,
    D: tl.constexpr,
    C: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the unscaled contribution of the keys from ``start`` on to the gradients of the queries."""
    tile = load_rows(k, start, keys, k_row, STEP, MASKED, D, C)
    values = load_rows(v, start, keys, v_row, STEP, MASKED, D, C)
    weights = tl.exp2(product(queries, tl.trans(tile)) * factor - norm)  # [ROWS, STEP]
    grad_logits = weights * (product(grads, tl.trans(values)) - center)
    if MASKED:
        inside = start + tl.arange(0, STEP) < keys
        grad_logits = tl.where(inside[None, :], grad_logits, 0.0)
    return product(grad_logits.to(tile.dtype), tile)
