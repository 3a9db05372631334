"""The time of each part of a pruning block."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import pruneattn
from bench.harness.measure import percentiles
from bench.harness.rows import Row, row_of
from bench.harness.subject import Subject
from pruneattn.models import PrunedViT
from pruneattn.models.blocks import kept_patches

PARTS = ("norm", "qkv", "attention", "select+gather", "proj", "mlp", "rest", "whole")


def part_rows(
    subject: Subject, x: torch.Tensor, keep_rate: float, rounds: int, seen: dict[object, list] | None = None
) -> list[Row]:
    """Measure each part of a block in interleaved rounds, unpruned and at a keep-rate.

    ``saving`` is the fraction of the part's time that pruning removes. ``theory`` is the same fraction of the part's
    MACs, for parts that have MACs.

    Args:
        subject: model whose first block is measured.
        x: input of the block ``[B, N, C]``.
        keep_rate: keep-rate of the pruned variant.
        rounds: measured rounds.
        seen: see `measure.measure_case`.

    Returns:
        A row for each keep-rate and part.
    """
    case, block = subject.case._replace(level="block parts"), subject.fast.blocks[0]
    rates = (1.0, keep_rate)
    seen = {} if seen is None else seen
    times = {rate: seen.setdefault((case, rate), []) for rate in rates}
    for turn in range(rounds + 1):
        for rate in rates if turn % 2 else reversed(rates):
            with torch.inference_mode():
                parts = part_times(block, x, rate)
            if turn:  # the first round warms up
                times[rate].append(parts)
    rows: list[Row] = []
    dense: dict[str, Row] = {}
    for rate in rates:
        macs = part_macs(subject.model, rate)
        for part in PARTS:
            row = row_of(
                **case._asdict(),
                provider="ours",
                backend=subject.fast_backend,
                keep_rate=rate,
                part=part,
                status="ok",
                timing="profiler",
                rounds=len(times[rate]),
                macs_computed=case.batch * macs[part] if part in macs else None,
                **percentiles([parts[part] for parts in times[rate]]),
            )
            before = dense.setdefault(part, row)
            if rate < 1 and before["p50_ms"] > 0:
                row["saving"] = 1 - row["p50_ms"] / before["p50_ms"]
                row["theory"] = 1 - row["macs_computed"] / before["macs_computed"] if part in macs else None
            rows.append(row)
    return rows


def part_times(block: Callable, x: torch.Tensor, keep_rate: float) -> dict[str, float]:
    """Profile one call of a block and return the seconds of each part.

    On CUDA the time of an operator is the time of its kernels. An operator belongs to the part in its name. Otherwise
    it belongs to the part of the block that the call has reached. Fused operators belong to one part: the class token's
    score to the selection, the selection by column means to the attention.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if x.is_cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler, record_function("block"):
        block(x, keep_rate)
    clock = "device_time_total" if x.is_cuda else "cpu_time_total"
    (whole,) = (event for event in profiler.events() if event.name == "block" and event.cpu_children)
    times = dict.fromkeys(PARTS, 0.0)
    attended, norms = False, 0
    for event in sorted(whole.cpu_children, key=lambda event: event.time_range.start):
        if "norm" in event.name:
            part, norms = "norm", norms + 1
        elif re.search("prune_tokens|select_tokens|gather_tokens", event.name):
            part = "select+gather"
        elif re.search("attention|cls_scores", event.name):
            part, attended = "attention", attended or "attention" in event.name
        elif norms > 1:
            part = "mlp"
        else:
            part = "proj" if attended else "qkv"
        times[part] += getattr(event, clock) * 1e-6
    times["whole"] = getattr(whole, clock) * 1e-6
    times["rest"] = times["whole"] - sum(times[part] for part in PARTS[:-2])
    return times


def part_macs(model: PrunedViT, keep_rate: float) -> dict[str, int]:
    """Multiply-accumulates of each part of the model's first block, for the matrix products of one clip."""
    dim, tokens = model.embed_dim, model.num_extra_tokens + model.num_patches
    kept = model.num_extra_tokens + kept_patches(model.num_patches, keep_rate)
    whole = pruneattn.count_macs(model, keep_rate).blocks[0][1]
    after = {"proj": kept * dim**2, "mlp": 8 * kept * dim**2}
    qkv = 3 * tokens * dim**2
    if model.score == "cls" and keep_rate < 1:
        qkv = (2 * tokens + kept + 1) * dim**2
    return {"qkv": qkv, **after, "attention": whole - qkv - sum(after.values()), "whole": whole}
