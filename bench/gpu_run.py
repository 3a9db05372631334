"""`make gpu`: build, tests, sanitizer and benchmarks on the CUDA device here, in one result file.

Writes bench/results/gpu-<date>.json with the device, driver, versions and commit, what each step said, and every
benchmark. Exit code 1 if a step failed; the file says which. Needs pybind11, ninja and setuptools in this Python.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import ROOT, describe_machine, output, write_result

KERNEL_TESTS = ["tests/csrc/test_kernels.py", "-k", "device"]


def check_gpu():
    if torch.version.cuda is None:
        sys.exit(f"error: torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device: torch.cuda.is_available() is False (see nvidia-smi)")


def describe_gpu():
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "device_memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
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
        result = {**describe_machine(), **describe_gpu(), "steps": steps, "benchmarks": read_benchmarks(report)}

    path = write_result("gpu", result)
    failed = [name for name, value in steps.items() if value["ok"] is False]
    print(f"== {result['device']}: {path.relative_to(ROOT)}, {len(result['benchmarks'])} benchmarks; "
          f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
