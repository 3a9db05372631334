"""Speed of a model over the keep-rates, all variants timed side by side."""

import copy
import itertools
import math
import time
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .inference import autocast, can_optimize, optimized

#: Ways to run a model at any keep-rate: as it is, by ``optimize_for_inference`` (on a CPU), by ``torch.compile``.
VARIANTS = ("eager", "optimized", "compiled")

# A round of calls shorter than this measures the clock and the scheduler.
_SHORTEST_ROUND = 0.05  # seconds


class Speed(NamedTuple):
    """Measured speed of a model.

    Attributes:
        clips_per_second: dict of keep-rate -> dict of variant (`VARIANTS`, and for the dense model others) -> clips per
            second.
        dense: the fastest variant without pruning.
    """

    clips_per_second: dict
    dense: str

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
        rounds: see ``time_side_by_side``.
        compiled: time each with ``torch.compile`` too.

    Returns:
        ``Speed``.
    """
    fbank = torch.randn(batch_size, model.frames, 128, device=device)
    fast, fast_amp = optimized(copy.deepcopy(model), device, amp)
    name = "optimized" if can_optimize(device, amp) else "eager"

    def call(module, amp=amp, kernel=None):
        with torch.inference_mode(), autocast(device, amp), nullcontext() if kernel is None else sdpa_kernel(kernel):
            return module(fbank)

    variants = {}
    for keep_rate in dict.fromkeys([1.0, *keep_rates]):
        variants[keep_rate, name] = partial(call, _at_keep_rate(fast, keep_rate), fast_amp)
        if compiled:
            pruned = torch.compile(_at_keep_rate(model, keep_rate), dynamic=False)
            variants[keep_rate, "compiled"] = partial(call, pruned)
    if torch.device(device).type == "cuda":
        variants |= _attention_kernels(partial(call, _at_keep_rate(model, 1.0)))
    else:
        variants[1.0, "eager, SDPA"] = partial(call, with_sdpa(_at_keep_rate(model, 1.0)))
    # Each keep-rate is a program of its own, but all count against the limit of one forward function.
    with torch._dynamo.config.patch(recompile_limit=2 * len(variants) + 8) if compiled else nullcontext():
        seconds = time_side_by_side(variants, device, rounds)
    clips_per_second = {}
    for (keep_rate, name), value in seconds.items():
        clips_per_second.setdefault(keep_rate, {})[name] = batch_size / value
    return Speed(clips_per_second, dense=max(clips_per_second[1.0], key=clips_per_second[1.0].get))


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


def _attention_kernels(call):
    """The dense model with each attention kernel that runs here, beside PyTorch's own choice."""
    variants = {}
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            call(kernel=kernel)
        except RuntimeError:  # not for this device or precision
            continue
        variants[1.0, f"eager, {kernel.name.lower()}"] = partial(call, kernel=kernel)
    return variants


def time_side_by_side(variants, device, rounds=9):
    """Median seconds per call of every variant: dict of name -> seconds. See ``rounds_side_by_side``."""
    return {name: median(values) for name, values in rounds_side_by_side(variants, device, rounds).items()}


def rounds_side_by_side(variants, device, rounds=9):
    """Seconds per call of every variant in each of several rounds, in which they take turns.

    Every round times each variant once, so a machine that slows down (heat, neighbours) slows them all. The order is
    turned around in every other round. Calls of one round follow one another without waiting; a round ends when the
    device is done.

    Args:
        variants: dict of name -> function without arguments.
        device: device on which they run.
        rounds: measured rounds; one more warms up, and says how many calls fill a round.

    Returns:
        dict of name -> list of seconds, one per round.
    """
    calls = {}
    for name, function in variants.items():
        _round(function, 1, device)  # compiles, allocates, picks kernels
        calls[name] = math.ceil(_SHORTEST_ROUND / max(_round(function, 1, device), 1e-6))
    seconds = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants) if turn % 2 == 0 else reversed(variants):
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
