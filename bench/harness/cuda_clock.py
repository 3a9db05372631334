"""Time on a CUDA device by events, with a cold L2, small calls as replays of a graph."""

from statistics import median

import torch

_SHORTEST_ROUND = 0.01  # seconds of calls in one round
_MOST_CALLS = 50  # in one round
_GRAPH_BELOW = 1e-3  # seconds: calls that take less are bound by how fast the host launches kernels


def rounds_by_events(variants, rounds, hot=False, graphs=True):
    """Seconds per call of every variant in each round, in which they take turns, the order turned around every time.

    Args:
        variants: dict of name -> function without arguments that works on the current device.
        rounds: measured rounds; each is the median of several calls.
        hot: leave the L2 cache as the call before left it; else it is written full before each call.
        graphs: replay calls below a millisecond as CUDA graphs.

    Returns:
        dict of name -> list of seconds; dict of name -> how it was timed, in words.
    """
    flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    calls, how, counts = {}, {}, {}
    for name, function in variants.items():
        for _ in range(3):  # compiles, allocates, picks kernels
            function()
        seconds = _median_seconds(function, 3, flush, hot)
        replay = captured(function) if graphs and seconds < _GRAPH_BELOW else None
        calls[name] = function if replay is None else replay
        how[name] = f"{'events' if replay is None else 'graph replay, events'}, {'hot' if hot else 'cold'} L2"
        counts[name] = min(_MOST_CALLS, 1 + int(_SHORTEST_ROUND / max(seconds, 1e-6)))
    seconds = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants) if turn % 2 == 0 else reversed(variants):
            seconds[name].append(_median_seconds(calls[name], counts[name], flush, hot))
    return seconds, how


def _median_seconds(function, calls, flush, hot):
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


def captured(function):
    """The call as a CUDA graph; None if it cannot be captured, for one because it waits for the device."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = function()  # the graph's output must outlive it
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay():
        graph.replay()
        return kept

    return replay
