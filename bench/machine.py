"""The machine, the versions and the commit that a result file was measured with, and where such files go."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def output(*command):
    """First line of what a command prints, "unknown" if it cannot run."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip().split("\n")[0] if run.returncode == 0 else "unknown"


def version(package):
    """Version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_machine():
    """What every result file says first."""
    build = output(sys.executable, "-c", "from pruneattn import _C; import json; print(json.dumps(_C.build_info()))")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "rev-parse", "HEAD"),
        "changed_files": output("git", "status", "--porcelain", "--untracked-files=no") not in ("", "unknown"),
        "cpu": output(sys.executable, "-c", "from pruneattn.timing import cpu_model; print(cpu_model())"),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": version("numpy"),
        "pruneattn_C": json.loads(build) if build != "unknown" else None,
    }


def write_result(kind, result, folder=RESULTS):
    """Write a result file named after its kind and its date, and return its path."""
    path = folder / f"{kind}-{result['date'][:19].replace(':', '')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
