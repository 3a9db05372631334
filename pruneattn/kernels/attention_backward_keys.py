"""Gradients of the keys and values of attention in Triton: a program computes a tile of key rows of one head."""

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
    lse: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    config: Config,
) -> Launch:
    """Return the launch that writes ``grad_k`` and ``grad_v`` from ``delta`` with these tile sizes."""
    batch, heads, rows, channels = q.shape
    keys = k.shape[2]
    return Launch(
        _grad_keys,
        (batch * heads * -(-keys // config.BLOCK_N),),
        dict(
            **strided(grad_out=grad_out, q=q, k=k, v=v, grad_k=grad_k, grad_v=grad_v),
            lse=lse,
            delta=delta,
            heads=heads,
            rows=rows,
            keys=keys,
            scale=scale,
            **tiles_of(channels, keys, config.BLOCK_N, rows, config.BLOCK_M),
        ),
        config,
    )


@triton.jit
def _grad_keys(
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
    grad_k,
    grad_k_batch,
    grad_k_head,
    grad_k_row,
    grad_v,
    grad_v_batch,
    grad_v_head,
    grad_v_row,
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
    tile, head_number, clip, head = locate(keys, heads, BLOCK)
    grad_out += clip * grad_out_batch + head * grad_out_head
    q += clip * q_batch + head * q_head
    k += clip * k_batch + head * k_head
    v += clip * v_batch + head * v_head
    grad_k += clip * grad_k_batch + head * grad_k_head
    grad_v += clip * grad_v_batch + head * grad_v_head
    lse += head_number * rows
    delta += head_number * rows
    if LAST == 0 or tile < keys // BLOCK:
        _key_rows(
            grad_out,
            grad_out_row,
            q,
            q_row,
            k,
            k_row,
            v,
            v_row,
            grad_k,
            grad_k_row,
            grad_v,
            grad_v_row,
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
        _key_rows(
            grad_out,
            grad_out_row,
            q,
            q_row,
            k,
            k_row,
            v,
            v_row,
            grad_k,
            grad_k_row,
            grad_v,
            grad_v_row,
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
def _key_rows(
    grad_out,
    grad_out_row,
    q,
    q_row,
    k,
    k_row,
    v,
    v_row,
    grad_k,
    grad_k_row,
    grad_v,
    grad_v_row,
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
    """Write the gradients of the keys and values from ``first`` on, by the transposed matrix ``[keys, queries]``."""
    factor = scale * LOG2_E
    tile = load_rows(k, first, keys, k_row, ROWS, ENDS, D, C)  # [ROWS, C]
    values = load_rows(v, first, keys, v_row, ROWS, ENDS, D, C)
    acc_k = tl.zeros([ROWS, C], tl.float32)
    acc_v = tl.zeros([ROWS, C], tl.float32)
    for query in tl.static_range(APART):
        query_row, grad_row = load_row(q, query, q_row, D, C), load_row(grad_out, query, grad_out_row, D, C)
        logits = tl.sum(tile.to(tl.float32) * query_row, 1)[:, None]
        weights = tl.exp2(logits * factor - tl.load(lse + query) * LOG2_E)
        acc_v += weights * grad_row
        grad_weights = tl.sum(values.to(tl.float32) * grad_row, 1)[:, None]
        acc_k += weights * (grad_weights - tl.load(delta + query)) * query_row
    whole = APART + (rows - APART) // STEP * STEP
    for start in range(APART, whole, STEP):
        more_k, more_v = _tile_grads(
            tile, values, q, q_row, grad_out, grad_out_row, lse, delta, start, rows, factor, D, C, STEP, False
        )
        acc_k += more_k
        acc_v += more_v
    if MASKED:
        more_k, more_v = _tile_grads(
            tile, values, q, q_row, grad_out, grad_out_row, lse, delta, whole, rows, factor, D, C, STEP, True
        )
        acc_k += more_k
        acc_v += more_v
    store_rows(grad_k, acc_k * scale, first, keys, grad_k_row, ROWS, D, C)
    store_rows(grad_v, acc_v, first, keys, grad_v_row, ROWS, D, C)


@triton.jit
def _tile_grads(
    tile,
    values,
    q,
    q_row,
    grad_out,
    grad_out_row,
    lse,
    delta,
    start,
    rows,
    factor,
    D: tl.constexpr,
    C: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the contributions of the queries from ``start`` on to the gradients of keys, unscaled, and values."""
    row = start + tl.arange(0, STEP)
    inside = row < rows if MASKED else None
    queries = load_rows(q, start, rows, q_row, STEP, MASKED, D, C)
    grads = load_rows(grad_out, start, rows, grad_out_row, STEP, MASKED, D, C)
    norm = tl.load(lse + row, mask=inside)[None, :] * LOG2_E
    center = tl.load(delta + row, mask=inside)[None, :]
    weights = tl.exp2(product(tile, tl.trans(queries)) * factor - norm)  # [ROWS, STEP]
    grad_logits = weights * (product(values, tl.trans(grads)) - center)
    if MASKED:
        weights = tl.where(inside[None, :], weights, 0.0)  # type: ignore[index]  # not None if MASKED
        grad_logits = tl.where(inside[None, :], grad_logits, 0.0)  # type: ignore[index]  # not None if MASKED
    return product(grad_logits.to(queries.dtype), queries), product(weights.to(grads.dtype), grads)
