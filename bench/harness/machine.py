"""Description of the machine, the versions and the commit of a result file, and the peak speeds of the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.harness.case import Work
from pruneattn.runtime import timing

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


class Peaks(NamedTuple):
    """Peak speeds of a machine.

    Attributes:
        copy: bytes per second of a large copy, read and written.
        product: dict of dtype name -> FLOP per second of a large matrix product.
    """

    copy: float
    product: dict[str, float]

    def floor_ms(self, dtype: str, work: Work) -> float | None:
        """Lower bound of the milliseconds of a call with this work; None if neither MACs nor bytes are known."""
        floors = []
        if work.macs_computed and dtype in self.product:
            floors.append(2e3 * work.macs_computed / self.product[dtype])
        if work.bytes:
            floors.append(1e3 * work.bytes / self.copy)
        return max(floors, default=None)


def measure_peaks(device: str, dtypes: Sequence[str], size: int = 2048, copied: int = 2**27) -> Peaks:
    """Measure the `Peaks` of a device. Each is the fastest of a few rounds, because a peak is an upper bound.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtypes: names of the dtypes.
        size: rows and columns of the matrices.
        copied: bytes of the copy.
    """
    source = torch.empty(copied, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    variants: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    for dtype in dtypes:
        matrix = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        variants[dtype] = lambda matrix=matrix: matrix @ matrix
    with torch.inference_mode():
        best = {name: min(times) for name, times in timing.interleaved_rounds(variants, device, 5).items()}
    return Peaks(2 * copied / best["copy"], {dtype: 2 * size**3 / best[dtype] for dtype in dtypes})


def output(*command: str, lines: int | None = 1) -> str:
    """First lines of a command's output (all with None); "unknown" if the command fails or does not exist."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return "unknown"
    return "\n".join(run.stdout.strip().split("\n")[:lines]) if run.returncode == 0 else "unknown"


def version(package: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_machine(device: str) -> dict[str, Any]:
    """Describe machine, versions and commit. Values are numbers and strings, or flat dicts of them."""
    packages = ("triton", "numpy", "torchaudio", "timm", "transformers", "onnxruntime")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "rev-parse", "HEAD"),
        "changed_files": output("git", "status", "--porcelain", "--untracked-files=no") not in ("", "unknown"),
        "device_name": torch.cuda.get_device_name() if device == "cuda" else timing.cpu_model(),
        "driver": _nvidia_smi("driver_version") if device == "cuda" else None,
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else None,
        "nvcc": _nvcc() if device == "cuda" else None,
        "clocks_mhz": _clocks(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        **{package: version(package) for package in packages},
        "pruneattn_C": _build_info(),
    }


def _clocks(device: str) -> dict[str, Any]:
    """Current clock frequencies in MHz by the driver or the system; on CUDA also the maximum frequencies."""
    if device == "cuda":
        return {
            name: _nvidia_smi(f"clocks.{name}") for name in ("current.sm", "max.sm", "current.memory", "max.memory")
        }
    info = Path("/proc/cpuinfo")
    clocks = re.findall(r"^cpu MHz\s*: ([\d.]+)", info.read_text(), re.MULTILINE) if info.exists() else []
    return {f"cpu {number}": float(clock) for number, clock in enumerate(clocks)}


def _nvidia_smi(field: str) -> str:
    return output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits")


def _nvcc() -> str | None:
    """Version of the compiler that the build uses by default."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    found = re.search(r"V([\d.]+)", output(nvcc, "--version", lines=None))
    return found.group(1) if found else None


def _build_info() -> dict[str, Any] | None:
    # In a separate process: if the extension is broken, everything else can still be measured.
    code = "import json, torch; from pruneattn import _C; print(json.dumps(_C.build_info() | {'isa': _C.cpu_isa()}))"
    build = output(sys.executable, "-c", code)
    return json.loads(build) if build != "unknown" else None
