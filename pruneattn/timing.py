"""Variants of a model timed side by side."""

import math
import time
from statistics import median

import torch

# A round of calls shorter than this measures the clock and the scheduler.
_SHORTEST_ROUND = 0.05  # seconds


def time_side_by_side(variants, device, rounds=9):
    """Median seconds per call of every variant, from rounds that take turns.

    Every round times each variant once, so a machine that slows down (heat, neighbours) slows them all. The order is
    turned around in every other round. Calls of one round follow one another without waiting; a round ends when the
    device is done.

    Args:
        variants: dict of name -> function without arguments.
        device: device on which they run.
        rounds: measured rounds; one more warms up, and says how many calls fill a round.

    Returns:
        dict of name -> seconds.
    """
    calls = {}
    for name, function in variants.items():
        _round(function, 1, device)  # compiles, allocates, picks kernels
        calls[name] = math.ceil(_SHORTEST_ROUND / max(_round(function, 1, device), 1e-6))
    seconds = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants) if turn % 2 == 0 else reversed(variants):
            seconds[name].append(_round(variants[name], calls[name], device) / calls[name])
    return {name: median(values) for name, values in seconds.items()}


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
