"""Speed of a model over the keep-rates, with all variants timed in interleaved rounds."""

from __future__ import annotations

import copy
import itertools
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ..constants import MEL_BINS
from ..models.blocks import Block
from ..models.vit import PrunedViT
from .inference import autocast, can_optimize, optimized

KeepRate = float | Sequence[float]
Variant = TypeVar("Variant")

#: Ways to run a model at any keep-rate: unchanged, with ``optimize_for_inference`` (on a CPU), with ``torch.compile``.
VARIANTS = ("eager", "optimized", "compiled")

# A shorter round of calls measures the clock and the scheduler.
_SHORTEST_ROUND = 0.05  # seconds


@dataclass(frozen=True)
class Speed:
    """Measured speed of a model.

    Attributes:
        seconds: dict of keep-rate -> dict of variant -> list of seconds per clip, one per round. Variants are those
            of `VARIANTS` and, without pruning, variants with PyTorch's attention kernels. Rounds are interleaved, so
            values of the same round are comparable.
    """

    seconds: dict[KeepRate, dict[str, list[float]]]

    @property
    def clips_per_second(self) -> dict[KeepRate, dict[str, float]]:
        """Dict of keep-rate -> dict of variant -> clips per second in the median round."""
        return {
            keep_rate: {name: 1 / median(rounds) for name, rounds in variants.items()}
            for keep_rate, variants in self.seconds.items()
        }

    @property
    def dense(self) -> str:
        """The fastest variant without pruning."""
        return self._fastest(1.0)

    @property
    def dense_clips_per_second(self) -> float:
        """Clips per second of the fastest variant without pruning."""
        return self.clips_per_second[1.0][self.dense]

    def row(self, keep_rate: KeepRate, theory: float) -> dict[str, float | None]:
        """Columns of a results table for one keep-rate.

        Args:
            keep_rate: one of the measured keep-rates.
            theory: fraction of MACs that pruning saves at this keep-rate, by the paper's count.

        Returns:
            dict: ``clips_per_second`` of the fastest variant; the same per variant if several were measured;
            ``saving = 1 - t_pruned / t_dense`` of the fastest variants; ``realised = saving / theory``, None if
            ``theory`` is 0.
        """
        variants = self.clips_per_second[keep_rate]
        fastest = max(variants.values())
        saving = 1 - self.dense_clips_per_second / fastest
        each = {f"clips_per_second_{name}": variants[name] for name in VARIANTS if name in variants}
        each = each if len(each) > 1 else {}
        return {"clips_per_second": fastest, **each, "saving": saving, "realised": saving / theory if theory else None}

    def spread(self, keep_rate: KeepRate) -> dict[str, float]:
        """Milliseconds per clip of the fastest variant at a keep-rate.

        Returns:
            dict: ``ms_per_clip``, the median over the rounds; ``ms_per_clip_p20`` and ``ms_per_clip_p80``, the 20th and
            80th percentiles.
        """
        rounds = self.seconds[keep_rate][self._fastest(keep_rate)]
        p20, p50, p80 = np.percentile(1000 * np.array(rounds), (20, 50, 80)).tolist()
        return {"ms_per_clip": p50, "ms_per_clip_p20": p20, "ms_per_clip_p80": p80}

    def _fastest(self, keep_rate: KeepRate) -> str:
        variants = self.seconds[keep_rate]
        return min(variants, key=lambda name: median(variants[name]))


def describe_device(device: torch.device | str) -> str:
    """Name of the GPU, or name of the CPU with the number of its threads that PyTorch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def cpu_model() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, (*names, platform.processor(), platform.machine())), "unknown CPU")


def measure_speed(
    model: PrunedViT,
    keep_rates: Iterable[KeepRate],
    device: torch.device | str,
    *,
    amp: str = "fp32",
    batch_size: int = 32,
    rounds: int = 9,
    compiled: bool = False,
) -> Speed:
    """Time the forward pass of a model at several keep-rates, and always without pruning.

    Only the model is timed: no decoding, no features, and inputs that are already on the device. On a CPU the model is
    optimized for inference. The unpruned model is also timed with every attention kernel that PyTorch has for the
    device, so that the baseline is the fastest unpruned variant.

    Args:
        model: ``PrunedViT`` on ``device``, in evaluation mode. It is not changed.
        keep_rates: each a number in (0, 1], or a tuple with one per pruning block; 1.0 is added if it is missing.
        device: device of the model.
        amp: "fp32", "bf16", "fp16" or "int8".
        batch_size: clips per call.
        rounds: see `interleaved_rounds`.
        compiled: also time each keep-rate with ``torch.compile``.

    Returns:
        `Speed`.
    """
    fbank = torch.randn(batch_size, model.frames, MEL_BINS, device=device)
    fast, fast_amp = optimized(copy.deepcopy(model), device, amp)
    name = "optimized" if can_optimize(device, amp) else "eager"

    def call(module: Callable[[torch.Tensor], torch.Tensor], amp: str = amp) -> torch.Tensor:
        with torch.inference_mode(), autocast(device, amp):
            return module(fbank)

    variants: dict[tuple[KeepRate, str], Callable[[], object]] = {}
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
    # Each keep-rate is a separate program, but all of them count toward the limit of one forward function.
    with torch._dynamo.config.patch(recompile_limit=2 * len(variants) + 8) if compiled else nullcontext():
        times = interleaved_rounds(variants, device, rounds)
    seconds: dict[KeepRate, dict[str, list[float]]] = {}
    for (keep_rate, variant), values in times.items():
        seconds.setdefault(keep_rate, {})[variant] = [value / batch_size for value in values]
    return Speed(seconds)


def _at_keep_rate(model: PrunedViT, keep_rate: KeepRate) -> PrunedViT:
    """Copy a model, sharing its weights, and set the keep-rate of the copy.

    Interleaved rounds need one object per keep-rate, so the context manager ``pruneattn.at_keep_rate`` does not fit:
    ``torch.compile`` specializes a program to the keep-rates of its object, a change of the keep-rate would be part of
    the timed call, and `with_sdpa` changes the attention kernel at every keep-rate of a model.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    model = copy.deepcopy(model, shared)
    model.set_keep_rate(keep_rate)
    return model


def with_sdpa(model: PrunedViT) -> PrunedViT:
    """Change a model in place to run PyTorch's attention, instead of this package's kernels, in unpruned blocks."""
    for block in model.blocks:
        cast(Block, block).attn.kernel = F.scaled_dot_product_attention
    return model


def attention_kernels(function: Callable[..., Any], *args: object) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Restrict a function to each of PyTorch's fused attention kernels, one after the other.

    Yields:
        ``(name, restricted, why_not)``: name of the kernel; the function, restricted to this kernel; why it cannot run
        with these arguments on this machine, or "".
    """
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        forced, why_not = partial(_by_kernel, kernel, function), ""
        try:
            forced(*args)
        except RuntimeError as error:  # the kernel does not support the device or the precision
            why_not = str(error).splitlines()[0]
        yield kernel.name.lower(), forced, why_not


def _by_kernel(kernel: SDPBackend, function: Callable[..., Any], *args: object) -> Any:
    with sdpa_kernel(kernel):
        return function(*args)


def interleaved_rounds(
    variants: Mapping[Variant, Callable[[], object]],
    device: torch.device | str,
    rounds: int = 9,
    called_before: bool = False,
) -> dict[Variant, list[float]]:
    """Measure the seconds per call of several variants in interleaved rounds.

    Every round times each variant once, so that a slowdown of the machine (heat, other processes) affects all variants.
    Every second round runs in reverse order. The calls of a round are not synchronized with the device; a round ends
    when the device has finished.

    Args:
        variants: dict of name -> function without arguments.
        device: device on which they run.
        rounds: number of measured rounds. Before them, each variant is called once; in a round, it is called as often
            as fills 50 ms.
        called_before: whether the variants have been called, so that a call compiles and allocates nothing more.

    Returns:
        dict of name -> list of seconds per call, one per round.
    """
    if not called_before:
        for function in variants.values():
            _round(function, 1, device)  # compiles, allocates, chooses kernels
    calls: dict[Variant, int] = {}
    seconds: dict[Variant, list[float]] = {name: [] for name in variants}
    for turn in tqdm(range(rounds), desc="timing", unit="round", disable=None, leave=False):
        for name in list(variants) if turn % 2 == 0 else reversed(list(variants)):
            if turn == 0:
                once = _round(variants[name], 1, device)
                calls[name] = math.ceil(_SHORTEST_ROUND / max(once, 1e-6))
                if calls[name] == 1:
                    seconds[name].append(once)
                    continue
            seconds[name].append(_round(variants[name], calls[name], device) / calls[name])
    return seconds


def _round(function: Callable[[], object], calls: int, device: torch.device | str) -> float:
    """Seconds of several calls, until the device has finished."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device | str) -> None:
    device = torch.device(device)
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
