"""Shared by the benchmarks: ``pytest bench --benchmark-only``, one group per op, device and shape."""

import contextlib

import pytest
import torch

from pruneattn import backends, use_backend
from pruneattn.backend import DEVICES, NAMES


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def batch(device):
    """Clips at once: enough to fill a GPU; few on the CPU."""
    return 64 if device.type == "cuda" else 4


@pytest.fixture
def dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture
def measure(benchmark, device):
    """``measure(op, provider, alternatives, *args)`` times one provider of an op after comparing what it returns.

    A provider is the name of a backend of ours or of one of the alternatives, functions of the same arguments. An
    alternative that returns less than the op is compared in what it returns.
    """

    def measure(op, provider, alternatives, *args, **tolerance):
        function = alternatives.get(provider, op)
        backend = contextlib.nullcontext() if provider in alternatives else use_backend(provider)
        with torch.inference_mode():
            with use_backend("reference"):
                expected = _as_tuple(op(*args))
            with backend:
                for ours, reference in zip(_as_tuple(function(*args)), expected):
                    torch.testing.assert_close(ours, reference, **tolerance)
                benchmark.group = f"{op.__name__} on {device}: {' '.join(map(_describe, args))}"
                benchmark(_synchronised(function, torch.device(device)), *args)

    return measure


def _as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def _describe(argument):
    if not isinstance(argument, torch.Tensor):
        return str(argument)
    return f"{str(argument.dtype).removeprefix('torch.')}{list(argument.shape)}"


def _synchronised(function, device):
    if device.type == "cpu":
        return function

    def run(*args):
        function(*args)
        torch.cuda.synchronize(device)

    return run


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"\n{backends()}")


def pytest_collection_modifyitems(config, items):
    """Quick by default, and without the backends that have no kernel to time: the summary says which and why."""
    absent = [item for item in items if "benchmark" in item.fixturenames and not _runs_here(item)]
    items[:] = [item for item in items if item not in absent]
    config.hook.pytest_deselected(items=absent)
    for item in items:
        item.add_marker(pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2))


def _runs_here(item):
    op, provider, device = item.path.stem.removeprefix("bench_"), *map(item.callspec.params.get, ("provider", "device"))
    if device == "cuda" and not torch.cuda.is_available():
        return False
    if provider not in NAMES:
        return True
    return DEVICES.get(provider, device) == device and not backends()[op][provider].reason
