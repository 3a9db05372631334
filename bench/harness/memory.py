"""Memory that a call adds while it runs."""

import ctypes
import math
import re
import sys
from pathlib import Path

import torch


def peak_growth(call, device):
    """MiB by which the memory in use grows at most during ``call()``; None where that cannot be told.

    On CUDA what PyTorch's allocator gives out, on Linux the memory of the process, which first gives back what it holds
    but does not use: else a call would find its memory there already.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux" or not _give_back():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is in use
    before = _peak_kib()
    call()
    return (_peak_kib() - before) / 1024


def available(device):
    """Bytes that a call could take on a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.exists() else None
    return math.inf if found is None else 1024 * int(found[1])


def _give_back():
    """Whether glibc, the only one that can, gave its free memory back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


def _peak_kib():
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
