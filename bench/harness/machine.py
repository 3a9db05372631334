"""The machine, the versions and the commit that a result file was measured with, and how fast the machine can be."""

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from pruneattn.runtime import timing

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


class Peaks(NamedTuple):
    """Speeds that nothing beats: bytes per second of a large copy, and FLOP per second of a large matrix product."""

    copy: float
    product: dict  # by dtype

    def floor_ms(self, dtype, work):
        """Milliseconds below which a call with this `measure.Work` cannot get; None if neither MACs nor bytes are known."""
        floors = []
        if work.macs_computed and dtype in self.product:
            floors.append(2e3 * work.macs_computed / self.product[dtype])
        if work.bytes:
            floors.append(1e3 * work.bytes / self.copy)
        return max(floors, default=None)


def measure_peaks(device, dtypes, size=2048, copied=2**27):
    """The `Peaks` of a device for some dtypes (names), by matrices ``[size, size]`` and a copy of so many bytes.

    The fastest of a few calls: a peak is what the machine can do, not what it usually does.
    """
    source = torch.empty(copied, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    variants = {"copy": lambda: target.copy_(source)}
    for dtype in dtypes:
        matrix = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        variants[dtype] = lambda matrix=matrix: matrix @ matrix
    with torch.inference_mode():
        best = {name: min(times) for name, times in timing.rounds_side_by_side(variants, device, 5).items()}
    return Peaks(2 * copied / best["copy"], {dtype: 2 * size**3 / best[dtype] for dtype in dtypes})


def output(*command, lines=1):
    """The first lines of what a command prints, "unknown" if it cannot run."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return "unknown"
    return "\n".join(run.stdout.strip().split("\n")[:lines]) if run.returncode == 0 else "unknown"


def version(package):
    """Version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_machine(device):
    """What every result file says first: flat, but for what names its parts."""
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


def _clocks(device):
    """Clock frequencies in MHz, as the driver or the system says: now, and the most there is (CUDA)."""
    if device == "cuda":
        return {
            name: _nvidia_smi(f"clocks.{name}") for name in ("current.sm", "max.sm", "current.memory", "max.memory")
        }
    info = Path("/proc/cpuinfo")
    clocks = re.findall(r"^cpu MHz\s*: ([\d.]+)", info.read_text(), re.MULTILINE) if info.exists() else []
    return {f"cpu {number}": float(clock) for number, clock in enumerate(clocks)}


def _nvidia_smi(field):
    return output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits")


def _nvcc():
    """Version of the compiler that the build takes if none is named."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    found = re.search(r"V([\d.]+)", output(nvcc, "--version", lines=None))
    return found.group(1) if found else None


def _build_info():
    # In another process: where the extension is broken, the rest can still be measured.
    code = "import torch; from pruneattn import _C; import json; print(json.dumps(_C.build_info() | {'isa': _C.cpu_isa()}))"
    build = output(sys.executable, "-c", code)
    return json.loads(build) if build != "unknown" else None
