"""Timing on a CUDA device with events, a cold L2 cache and CUDA graphs of short calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import Any, TypeVar

import torch

_SHORTEST_ROUND = 0.01  # seconds of calls in one round
_MOST_CALLS = 50  # in one round
_GRAPH_BELOW = 1e-3  # seconds; the time of shorter calls depends on the launch speed of the host

Name = TypeVar("Name", bound=Hashable)
Call = Callable[[], Any]


def rounds_by_events(
    variants: Mapping[Name, Call], rounds: int, hot: bool = False, graphs: bool = True
) -> tuple[dict[Name, list[float]], dict[Name, str]]:
    """Measure the seconds per call of every variant in interleaved rounds. Every second round runs in reverse order.

    Args:
        variants: dict of name -> function without arguments that works on the current device.
        rounds: measured rounds. Each one is the median of several calls.
        hot: leave the L2 cache as the previous call left it. Otherwise it is overwritten before each call.
        graphs: replay calls below a millisecond as CUDA graphs.

    Returns:
        dict of name -> list of seconds; dict of name -> description of the timing.
    """
    flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    calls, how, counts = {}, {}, {}
    for name, function in variants.items():
        for _ in range(3):  # compiles, allocates, chooses kernels
            function()
        seconds = _median_seconds(function, 3, flush, hot)
        replay = captured(function) if graphs and seconds < _GRAPH_BELOW else None
        calls[name] = function if replay is None else replay
        how[name] = f"{'events' if replay is None else 'graph replay, events'}, {'hot' if hot else 'cold'} L2"
        counts[name] = min(_MOST_CALLS, 1 + int(_SHORTEST_ROUND / max(seconds, 1e-6)))
    times: dict[Name, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants) if turn % 2 == 0 else reversed(list(variants)):
            times[name].append(_median_seconds(calls[name], counts[name], flush, hot))
    return times, how


def _median_seconds(function: Call, calls: int, flush: torch.Tensor, hot: bool) -> float:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    torch.cuda.synchronize()
    for start, end in events:
        if not hot:
            flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) / 1e3


def captured(function: Call) -> Call | None:
    """Capture a call as a CUDA graph and return its replay.

    None if the call cannot be captured, for example because it synchronizes with the device.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = function()  # the graph's output must outlive it
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay() -> Any:
        graph.replay()
        return kept

    return replay
