"""`make gpu`: build, tests, sanitizer and benchmarks on the CUDA device here, in one result file.

Writes what `pytest bench/ --benchmark-only` writes, and in the same JSON file (bench/results/gpu-<date>.json) what each
step said. Exit code 1 if a step failed; the file says which. Needs pybind11, ninja and setuptools in this Python.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.machine import RESULTS, ROOT, describe_machine
from bench.rows import SCHEMA
from pruneattn.io import atomic_write

KERNEL_TESTS = ["tests/csrc/test_kernels.py", "-k", "device"]


def check_gpu():
    if torch.version.cuda is None:
        sys.exit(f"error: torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device: torch.cuda.is_available() is False (see nvidia-smi)")


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


def write_with_steps(steps, measured, folder=RESULTS):
    """Put the benchmarks' result file (None if there is none) and the steps into one file there; returns its path."""
    if measured is None:
        result = {"schema": SCHEMA, "machine": describe_machine("cuda"), "rows": []}
        name = f"gpu-{result['machine']['date'][:19].replace(':', '')}.json"
    else:
        result, name = json.loads(measured.read_text(encoding="utf-8")), measured.name
        shutil.copy(measured.with_suffix(".csv"), folder)
    with atomic_write(folder / name) as temporary:
        temporary.write_text(json.dumps({**result, "steps": steps}, indent=1) + "\n", encoding="utf-8")
    return folder / name


def main(arguments):
    """``arguments`` go to the benchmarks, such as ``--bench-full``."""
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
        command = [*python, "pytest", "bench", "--benchmark-only", f"--bench-output={folder}", *arguments]
        steps["benchmarks"] = step("benchmarks", command)
        path = write_with_steps(steps, next(Path(folder).glob("*.json"), None))
    failed = [name for name, value in steps.items() if value["ok"] is False]
    print(f"== {torch.cuda.get_device_name()}: {path.relative_to(ROOT)}; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
