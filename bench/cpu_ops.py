"""Sections ``ops`` and ``threads`` of a CPU run: attention with its score against attention without one."""

import copy
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from cpu_models import make_model
from report import dtype_name, label_text, measure
from shapes import random_qkv

import pruneattn
from pruneattn import ops
from pruneattn.backend import _C


@contextmanager
def instruction_set(name):
    """Make the attention kernels use this instruction set."""
    before = _C.cpu_isa()
    _C.cpu_use_isa(name)
    try:
        yield
    finally:
        _C.cpu_use_isa(before)


@contextmanager
def threads(count):
    """Compute on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def within(context, function):
    """The function, each call of it in a new ``context()``."""

    def call():
        with context():
            return function()

    return call


def run_ops(settings):
    yield "Attention with the score beside SDPA, which has none", [
        row
        for dtype in settings.dtypes
        for batch in settings.batches
        for tokens in settings.tokens
        for row in _attention_rows(settings, batch, tokens, dtype)
    ]
    yield "Selection and gathering beside the pruning block they are in (keep-rate 0.5)", [
        row for dtype in settings.dtypes for row in _selection_rows(settings, dtype)
    ]


def _attention_rows(settings, batch, tokens, dtype):
    q, k, v = random_qkv(batch, tokens, "cpu", dtype, settings.heads)
    with_score = partial(ops.column_mean_attention, q, k, v, 1)
    variants = {"SDPA": partial(F.scaled_dot_product_attention, q, k, v)}
    for name in _C.cpu_isas():
        variants[f"column_mean_attention, {name}"] = within(partial(instruction_set, name), with_score)
    variants["cls_scores"] = partial(ops.cls_scores, q[:, :, 0], k, 1)
    shape = {"dtype": dtype_name(dtype), "batch": batch, "tokens": tokens}
    times = measure(f"attention, {label_text(shape)}", variants, settings.op_rounds)
    sdpa, ours = (times[name]["p50_ms"] for name in list(variants)[:2])
    return [
        {**shape, "what": name, **time, "of_sdpa": time["p50_ms"] / sdpa, "of_column_mean": time["p50_ms"] / ours}
        for name, time in times.items()
    ]


def _selection_rows(settings, dtype):
    model = make_model(settings, "audiomae", depth=1, prune_blocks=(0,), keep_rate=0.5)
    extra, patches = model.num_extra_tokens, model.num_patches
    block = pruneattn.optimize_for_inference(copy.deepcopy(model), dtype).blocks[0]
    scores = torch.rand(settings.batch, patches)
    x, y = torch.randn(2, settings.batch, extra + patches, model.embed_dim).to(dtype)
    index = ops.select_tokens(scores, patches // 2)
    variants = {
        "pruning block": partial(block, x),
        "select_tokens": partial(ops.select_tokens, scores, patches // 2),
        "gather_tokens": partial(ops.gather_tokens, x, index, extra),
        "prune_tokens": partial(ops.prune_tokens, scores, x, y, patches // 2, extra),
    }
    shape = {"dtype": dtype_name(dtype), "batch": settings.batch, "tokens": extra + patches}
    times = measure(f"selection, {label_text(shape)}", variants, settings.op_rounds)
    whole = times["pruning block"]["p50_ms"]
    return [{**shape, "what": name, **time, "of_block": time["p50_ms"] / whole} for name, time in times.items()]


def run_threads(settings):
    rows = []
    for dtype in settings.dtypes:
        for tokens in settings.tokens:
            call = partial(ops.column_mean_attention, *random_qkv(1, tokens, "cpu", dtype, settings.heads), 1)
            shape = {"dtype": dtype_name(dtype), "batch": 1, "tokens": tokens}
            variants = {count: within(partial(threads, count), call) for count in (1, 2)}
            times = measure(f"threads, {label_text(shape)}", variants, settings.op_rounds)
            single = times[1]["p50_ms"]
            for count, time in times.items():
                rows.append({**shape, "threads": count, **time, "speed_up": single / time["p50_ms"]})
    yield "column_mean_attention of one clip on 1 and on 2 threads", rows
