"""Memory that a call adds while it runs."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_growth(call: Callable[[], object], device: torch.device | str) -> float | None:
    """Measure the MiB by which the memory in use grows at most during a call.

    On CUDA this is the memory of PyTorch's allocator. On Linux it is the memory of the process. Before the call, the
    process returns free memory to the system, because the call would otherwise reuse it without any growth.

    Returns:
        MiB, or None where the growth cannot be measured.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux" or not _trim():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use
    before = _peak_kib()
    call()
    return (_peak_kib() - before) / 1024


def available(device: torch.device | str) -> float:
    """Bytes of memory that a call can use on a device; infinity if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.exists() else None
    return math.inf if found is None else 1024 * int(found[1])


def _trim() -> bool:
    """Return free memory to the system. False if the C library, which is not glibc, cannot."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


def _peak_kib() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None  # Linux has this line for every process
    return int(found[1])
