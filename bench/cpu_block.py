"""Sections ``block`` and ``memory`` of a CPU run: where a pruning block's time goes, and what memory it takes."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import peers
import torch
from cpu_models import FAMILIES, make_model
from report import Settings, dtype_name, label_text, percentiles, progress
from torch.profiler import ProfilerActivity, profile, record_function

import pruneattn
from pruneattn.models.blocks import kept_patches

KEEP_RATE = 0.5
PARTS = ("norm", "qkv", "attention", "select+gather", "proj", "mlp", "rest", "whole")
PAPERS_WAY = "the paper's way"


def one_block(settings, family):
    """A model of one block, which prunes, and that block's input ``[B, N, C]``."""
    model = make_model(settings, family, depth=1, prune_blocks=(0,), keep_rate=KEEP_RATE)
    return model, torch.randn(settings.batch, model.num_extra_tokens + model.num_patches, model.embed_dim)


# Time -----------------------------------------------------------------------------------------------------------------


def run_block(settings):
    for family in FAMILIES:
        for dtype in settings.dtypes:
            model, x = one_block(settings, family)
            optimised = pruneattn.optimize_for_inference(copy.deepcopy(model), dtype)
            title = f"Parts of a block, unpruned and at keep-rate {KEEP_RATE}: {model.name}, {dtype_name(dtype)}"
            yield title, _part_rows(settings, model, optimised.blocks[0], x.to(dtype))


def _part_rows(settings, model, block, x):
    label = {"model": model.name, "dtype": dtype_name(x.dtype), "batch": len(x)}
    progress(f"timing the parts of a block, {label_text(label)}: {settings.op_rounds} rounds")
    rates = (1.0, KEEP_RATE)
    rounds = {rate: [] for rate in rates}
    for turn in range(settings.op_rounds + 1):
        for rate in rates if turn % 2 else reversed(rates):
            block.keep_rate = rate
            with torch.inference_mode():
                rounds[rate].append(part_times(block, x))
    rows = []
    for part in PARTS:
        dense, pruned = (percentiles([times[part] for times in rounds[rate][1:]]) for rate in rates)  # one warms up
        macs = [_part_macs(model, rate).get(part) for rate in rates]
        rows.append(
            {**label, "part": part,
             **{f"dense_{name}": value for name, value in dense.items()},
             **{f"pruned_{name}": value for name, value in pruned.items()},
             "ratio": pruned["p50_ms"] / dense["p50_ms"] if dense["p50_ms"] else None,
             "macs_ratio": macs[1] / macs[0] if macs[0] else None}
        )  # fmt: skip
    return rows


def part_times(block, x):
    """Seconds of each part in one call of a block, as the profiler saw its operators.

    An operator belongs to the part that its name says, or else to the part of the block that the call has reached.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        with record_function("block"):
            block(x)
    (whole,) = (event for event in profiler.events() if event.name == "block")
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
        times[part] += event.cpu_time_total * 1e-6
    times["whole"] = whole.cpu_time_total * 1e-6
    times["rest"] = times["whole"] - sum(times[part] for part in PARTS[:-2])
    return times


def _part_macs(model, keep_rate):
    """Multiply-accumulates of the matrix products that a block runs for one clip, by part."""
    dim, tokens = model.embed_dim, model.num_extra_tokens + model.num_patches
    kept = model.num_extra_tokens + kept_patches(model.num_patches, keep_rate)
    model.set_keep_rate(keep_rate)
    whole = pruneattn.count_macs(model).blocks[0][1]
    after = {"proj": kept * dim**2, "mlp": 8 * kept * dim**2}
    qkv = 3 * tokens * dim**2
    if model.score == "cls" and keep_rate < 1:
        qkv = (2 * tokens + kept + 1) * dim**2
    return {"qkv": qkv, **after, "attention": whole - qkv - sum(after.values()), "whole": whole}


# Memory ---------------------------------------------------------------------------------------------------------------


def run_memory(settings):
    rows = []
    for family in FAMILIES:
        for dtype in settings.dtypes:
            for what in ("ours", PAPERS_WAY):
                progress(f"measuring the memory of {what}, {family}, {dtype_name(dtype)}")
                arguments = [family, dtype_name(dtype), what, settings.size, settings.frames, settings.batch]
                command = [sys.executable, __file__, json.dumps(arguments)]
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows.append(
                    {"model": f"{family}_{settings.size}", "dtype": dtype_name(dtype), "batch": settings.batch,
                     "what": what, "growth_mib": float(run.stdout)}
                )  # fmt: skip
    yield f"Peak memory that one call of a pruning block (keep-rate {KEEP_RATE}) adds", rows


def peak_growth(call):
    """MiB by which the memory of this process grows at most during the call. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is in use
    before = _peak_kib()
    call()
    return (_peak_kib() - before) / 1024


def _peak_kib():
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure_memory(family, dtype, what, size, frames, batch):
    """The peak growth of one call in this process, which has done nothing else with a block of this size."""
    settings, dtype = Settings(size=size, frames=frames, batch=batch), getattr(torch, dtype)
    model, x = one_block(settings, family)
    if what == PAPERS_WAY:
        block = peers.PapersViT(model.to(dtype), keep_rate=KEEP_RATE).blocks[0]
    else:
        block = pruneattn.optimize_for_inference(model, dtype).blocks[0]
    x = x.to(dtype)
    with torch.inference_mode():
        block(x[:1, :17])  # loads libraries, starts threads
        return peak_growth(lambda: block(x))


if __name__ == "__main__":
    print(measure_memory(*json.loads(sys.argv[1])))
