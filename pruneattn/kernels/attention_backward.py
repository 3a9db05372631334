"""Gradients of attention in Triton, from its output and log-sum-exp; every sum has one owner, so no atomics.

The first kernel goes by queries and the second by keys, each with the softmax matrix computed again, tile by tile.
"""

import triton
import triton.language as tl

from .launch import Launch, choose, strided, tiles_of
from .tiles import LOG2_E, load_row, load_rows, locate, product, store_rows


def attention_backward(grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, delta, scale):
    """Write the gradients of ``q`` ``[B, H, M, D]``, ``k`` and ``v`` ``[B, H, N, D]``.

    All but ``lse`` and the scratch ``delta`` (float32 ``[B, H, M]``): any strides with contiguous channels.
    """
    by_queries, by_keys = choose("grad_queries", q, q.shape[2]), choose("grad_keys", k, k.shape[2])
    launch_queries(grad_out, q, k, v, out, lse, grad_q, delta, scale, by_queries).run(q)
    launch_keys(grad_out, q, k, v, lse, grad_k, grad_v, delta, scale, by_keys).run(q)


def launch_queries(grad_out, q, k, v, out, lse, grad_q, delta, scale, config):
    """The launch that writes ``grad_q``, and for the next one ``delta``, with these tile sizes."""
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


def launch_keys(grad_out, q, k, v, lse, grad_k, grad_v, delta, scale, config):
    """The launch that writes ``grad_k`` and ``grad_v`` with these tile sizes; ``delta`` is there already."""
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
    """Gradient of the query rows from ``first`` on."""
    factor = scale * LOG2_E
    row = first + tl.arange(0, ROWS)
    queries = load_rows(q, first, rows, q_row, ROWS, ENDS, D, C)  # [ROWS, C]
    grads = load_rows(grad_out, first, rows, grad_out_row, ROWS, ENDS, D, C)
    outs = load_rows(out, first, rows, out_row, ROWS, ENDS, D, C)
    norm = tl.load(lse + row, mask=row < rows, other=0.0)[:, None] * LOG2_E
    centre = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + row, centre, mask=row < rows)
    centre = centre[:, None]
    acc = tl.zeros([ROWS, C], tl.float32)
    for key in tl.static_range(APART):
        key_row = load_row(k, key, k_row, D, C)
        logits = tl.sum(queries.to(tl.float32) * key_row, 1)[:, None]
        grad_weights = tl.sum(grads.to(tl.float32) * load_row(v, key, v_row, D, C), 1)[:, None]
        acc += tl.exp2(logits * factor - norm) * (grad_weights - centre) * key_row
    whole = APART + (keys - APART) // STEP * STEP
    for start in range(APART, whole, STEP):
        acc += _tile_grad(queries, grads, norm, centre, k, k_row, v, v_row, start, keys, factor, D, C, STEP, False)
    if MASKED:
        acc += _tile_grad(queries, grads, norm, centre, k, k_row, v, v_row, whole, keys, factor, D, C, STEP, True)
    store_rows(grad_q, acc * scale, first, rows, grad_q_row, ROWS, D, C)


@triton.jit
def _tile_grad(
    queries,
    grads,
    norm,
    centre,
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
    """What the keys from ``start`` on add to the gradient of the queries, but for the scale."""
    tile = load_rows(k, start, keys, k_row, STEP, MASKED, D, C)
    values = load_rows(v, start, keys, v_row, STEP, MASKED, D, C)
    weights = tl.exp2(product(queries, tl.trans(tile)) * factor - norm)  # [ROWS, STEP]
    grad_logits = weights * (product(grads, tl.trans(values)) - centre)
    if MASKED:
        inside = start + tl.arange(0, STEP) < keys
        grad_logits = tl.where(inside[None, :], grad_logits, 0.0)
    return product(grad_logits.to(tile.dtype), tile)


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
    """Gradients of the keys and values from ``first`` on, by the softmax matrix transposed: ``[keys, queries]``."""
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
    """What the queries from ``start`` on add to the gradients of keys and values, but for the keys' scale."""
    row = start + tl.arange(0, STEP)
    inside = row < rows if MASKED else None
    queries = load_rows(q, start, rows, q_row, STEP, MASKED, D, C)
    grads = load_rows(grad_out, start, rows, grad_out_row, STEP, MASKED, D, C)
    norm = tl.load(lse + row, mask=inside)[None, :] * LOG2_E
    centre = tl.load(delta + row, mask=inside)[None, :]
    weights = tl.exp2(product(tile, tl.trans(queries)) * factor - norm)  # [ROWS, STEP]
    grad_logits = weights * (product(values, tl.trans(grads)) - centre)
    if MASKED:
        weights = tl.where(inside[None, :], weights, 0.0)
        grad_logits = tl.where(inside[None, :], grad_logits, 0.0)
    return product(grad_logits.to(queries.dtype), queries), product(weights.to(grads.dtype), grads)
