"""`make gpu`: build, tests, sanitizer and benchmarks on the CUDA device here, in one result file.

Writes bench/results/gpu-<date>.json with the device, driver, versions and commit, what each step said, and every
benchmark. Exit code 1 if a step failed; the file says which. Needs pybind11, ninja and setuptools in this Python.
"""

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = ["tests/csrc/test_kernels.py", "-k", "device"]


def output(*command):
    """First line of what a command prints, "unknown" if it cannot run."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip().split("\n")[0] if run.returncode == 0 else "unknown"


def check_gpu():
    import torch

    if torch.version.cuda is None:
        sys.exit(f"error: torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device: torch.cuda.is_available() is False (see nvidia-smi)")


def describe_machine():
    import numpy
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    properties = torch.cuda.get_device_properties(0)
    build = output(sys.executable, "-c", "from pruneattn import _C; import json; print(json.dumps(_C.build_info()))")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "rev-parse", "HEAD"),
        "changed_files": output("git", "status", "--porcelain", "--untracked-files=no") not in ("", "unknown"),
        "device": properties.name,
        "device_memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton_version,
        "numpy": numpy.__version__,
        "pruneattn_C": json.loads(build) if build != "unknown" else None,
    }


def step(name, command):
    """Runs a command, shows its output as it comes, and returns what the result file keeps of it."""
    print(f"== {name}: {' '.join(map(str, command))}", flush=True)
    begin, tail = time.monotonic(), []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
        tail = [*tail[-9:], line.rstrip()]
    code = process.wait()
    return {"ok": code == 0, "exit_code": code, "seconds": round(time.monotonic() - begin, 1), "tail": tail}


def read_benchmarks(path):
    if not path.exists():
        return []
    keep = ("min", "q1", "median", "q3", "mean", "stddev", "rounds", "iterations")
    return [{"name": b["fullname"], "group": b["group"], "params": b["params"], "extra_info": b["extra_info"],
             "seconds": {key: b["stats"][key] for key in keep}} for b in json.loads(path.read_text())["benchmarks"]]


def main():
    check_gpu()
    python = [sys.executable, "-m"]
    steps = {"build": step("build", [*python, "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps"])}
    if not steps["build"]["ok"]:
        sys.exit("error: pruneattn could not be built: see above")
    steps["tests"] = step("tests", [*python, "pytest", "tests", "--durations=15"])
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            steps[tool] = {"ok": None, "tail": ["compute-sanitizer is not installed: not run"]}
        else:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *python, "pytest", *KERNEL_TESTS]
            steps[tool] = step(tool, command)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "bench.json")
        steps["benchmarks"] = step("benchmarks", [*python, "pytest", "bench", "--benchmark-only",
                                                  f"--benchmark-json={report}"])
        result = {**describe_machine(), "steps": steps, "benchmarks": read_benchmarks(report)}

    path = ROOT / "bench" / "results" / f"gpu-{result['date'][:19].replace(':', '')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    failed = [name for name, value in steps.items() if value["ok"] is False]
    print(f"== {result['device']}: {path.relative_to(ROOT)}, {len(result['benchmarks'])} benchmarks; "
          f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
