"""Speed of a model over the keep-rates, all variants timed side by side."""

import copy
import itertools
import math
import os
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from .inference import autocast, can_optimize, optimized

#: Ways to run a model at any keep-rate: as it is, by ``optimize_for_inference`` (on a CPU), by ``torch.compile``.
VARIANTS = ("eager", "optimized", "compiled")

# A round of calls shorter than this measures the clock and the scheduler.
_SHORTEST_ROUND = 0.05  # seconds


@dataclass(frozen=True)
class Speed:
    """Measured speed of a model.

    Attributes:
        seconds: dict of keep-rate -> dict of variant (`VARIANTS`, and for the dense model others) -> list of seconds a
            clip, one per round. Variants were timed side by side, so those of one round belong together.
    """

    seconds: dict

    @property
    def clips_per_second(self):
        """Dict of keep-rate -> dict of variant -> clips per second, by the median round."""
        return {
            keep_rate: {name: 1 / median(rounds) for name, rounds in variants.items()}
            for keep_rate, variants in self.seconds.items()
        }

    @property
    def dense(self):
        """The fastest variant without pruning."""
        return self._fastest(1.0)

    @property
    def dense_clips_per_second(self):
        return self.clips_per_second[1.0][self.dense]

    def row(self, keep_rate, theory):
        """What a table says about a keep-rate, whose share of saved work is ``theory``.

        ``saving = 1 - t_pruned / t_dense`` of the fastest variants, and ``realised = saving / theory`` (None where
        there is nothing to save).
        """
        variants = self.clips_per_second[keep_rate]
        fastest = max(variants.values())
        saving = 1 - self.dense_clips_per_second / fastest
        each = {f"clips_per_second_{name}": variants[name] for name in VARIANTS if name in variants}
        each = each if len(each) > 1 else {}
        return {"clips_per_second": fastest, **each, "saving": saving, "realised": saving / theory if theory else None}

    def spread(self, keep_rate):
        """Milliseconds a clip of the fastest variant at a keep-rate: ``ms_per_clip``, the median of the rounds, and
        ``ms_per_clip_p20`` and ``ms_per_clip_p80``, between which three fifths of them lie.
        """
        rounds = self.seconds[keep_rate][self._fastest(keep_rate)]
        p20, p50, p80 = np.percentile(1000 * np.array(rounds), (20, 50, 80)).tolist()
        return {"ms_per_clip": p50, "ms_per_clip_p20": p20, "ms_per_clip_p80": p80}

    def _fastest(self, keep_rate):
        variants = self.seconds[keep_rate]
        return min(variants, key=lambda name: median(variants[name]))


def describe_device(device):
    """Name of the GPU, or of the CPU with the threads that PyTorch uses of it."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def cpu_model():
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, (*names, platform.processor(), platform.machine())), "unknown CPU")


def measure_speed(model, keep_rates, device, *, amp="fp32", batch_size=32, rounds=9, compiled=False):
    """Time the forward pass of a model at each of the keep-rates, and without pruning even if 1 is not among them.

    The model alone: no decoding, no features, inputs at hand; on a CPU it is optimized for inference. Without pruning
    every attention kernel that PyTorch has for the device is tried too, so that the pruned model is held against the
    fastest dense one.

    Args:
        model: ``PrunedViT`` on ``device``, in eval mode.
        keep_rates: numbers.
        device: where to run.
        amp: "fp32", "bf16" or "fp16".
        batch_size: clips per call.
        rounds: see ``rounds_side_by_side``.
        compiled: time each with ``torch.compile`` too.

    Returns:
        `Speed`.
    """
    fbank = torch.randn(batch_size, model.frames, 128, device=device)
    fast, fast_amp = optimized(copy.deepcopy(model), device, amp)
    name = "optimized" if can_optimize(device, amp) else "eager"

    def call(module, amp=amp):
        with torch.inference_mode(), autocast(device, amp):
            return module(fbank)

    variants = {}
    for keep_rate in dict.fromkeys([1.0, *keep_rates]):
        variants[keep_rate, name] = partial(call, _at_keep_rate(fast, keep_rate), fast_amp)
        if compiled:
            pruned = torch.compile(_at_keep_rate(model, keep_rate), dynamic=False)
            variants[keep_rate, "compiled"] = partial(call, pruned)
    if torch.device(device).type == "cuda":
        for kernel, forced, why_not in attention_kernels(partial(call, _at_keep_rate(model, 1.0))):
            if not why_not:
                variants[1.0, f"eager, {kernel}"] = forced
    else:
        variants[1.0, "eager, SDPA"] = partial(call, with_sdpa(_at_keep_rate(model, 1.0)))
    # Each keep-rate is a program of its own, but all count against the limit of one forward function.
    with torch._dynamo.config.patch(recompile_limit=2 * len(variants) + 8) if compiled else nullcontext():
        times = rounds_side_by_side(variants, device, rounds)
    seconds = {}
    for (keep_rate, name), values in times.items():
        seconds.setdefault(keep_rate, {})[name] = [value / batch_size for value in values]
    return Speed(seconds)


def _at_keep_rate(model, keep_rate):
    """The model at another keep-rate, sharing the weights."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    model = copy.deepcopy(model, shared)
    model.set_keep_rate(keep_rate)
    return model


def with_sdpa(model):
    """The model, with PyTorch's attention instead of ours in unpruned blocks."""
    for block in model.blocks:
        block.attn.kernel = F.scaled_dot_product_attention
    return model


def attention_kernels(function, *args):
    """Call a function by each of PyTorch's fused attention kernels, beside its own choice.

    Yields:
        ``(name, the function by this kernel alone, why it cannot run these arguments here or "")``.
    """
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        forced, why_not = partial(_by_kernel, kernel, function), ""
        try:
            forced(*args)
        except RuntimeError as error:  # not for this device or precision
            why_not = str(error).splitlines()[0]
        yield kernel.name.lower(), forced, why_not


def _by_kernel(kernel, function, *args):
    with sdpa_kernel(kernel):
        return function(*args)


def rounds_side_by_side(variants, device, rounds=9, called_before=False):
    """Seconds per call of every variant in each of several rounds, in which they take turns.

    Every round times each variant once, so a machine that slows down (heat, neighbours) slows them all. The order is
    turned around in every other round. Calls of one round follow one another without waiting; a round ends when the
    device is done.

    Args:
        variants: dict of name -> function without arguments.
        device: device on which they run.
        rounds: measured rounds. Each variant is called once before them, and as often in a round as fills it.
        called_before: nothing more is to be compiled, allocated or picked by a call.

    Returns:
        dict of name -> list of seconds, one per round.
    """
    if not called_before:
        for function in variants.values():
            _round(function, 1, device)  # compiles, allocates, picks kernels
    calls, seconds = {}, {name: [] for name in variants}
    for turn in tqdm(range(rounds), desc="timing", unit="round", disable=None, leave=False):
        for name in list(variants) if turn % 2 == 0 else reversed(variants):
            if turn == 0:
                once = _round(variants[name], 1, device)
                calls[name] = math.ceil(_SHORTEST_ROUND / max(once, 1e-6))
                if calls[name] == 1:
                    seconds[name].append(once)
                    continue
            seconds[name].append(_round(variants[name], calls[name], device) / calls[name])
    return seconds


def _round(function, calls, device):
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device):
    device = torch.device(device)
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
