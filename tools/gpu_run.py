"""`make gpu`: build, tests, benchmarks and sanitizer on the CUDA device here, in one result file.

The tests that use a device (``-m device``; the others are for ``make test``), the small grid of the benchmarks, and
compute-sanitizer over some of our kernels' tests. A step that is at its limit (`LIMITS`, eleven minutes in all) is
stopped, said to have been, and the next one begins. ``python -m tools.gpu_run --no-limits --bench-full`` takes the time
it takes; other options than ``--no-limits`` go to the benchmarks.

The result file (bench/results/gpu-<date>.json) is what `pytest bench/ --benchmark-only` writes and in it what each step
said. It is written after every step. Exit code 1 if a step failed; the table at the end says which. Needs pytest,
pybind11, ninja and setuptools in this Python; pytest-xdist makes the tests faster. The steps find the package in this
folder, also where a Python does not see what was installed into it in place.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec

import torch

from bench.harness.machine import RESULTS, ROOT, describe_machine
from bench.harness.rows import SCHEMA
from pruneattn.files import atomic_write

#: Seconds after which a step is stopped. The benchmarks stop by themselves before that.
LIMITS = {"build": 180, "tests": 130, "benchmarks": 240, "memcheck": 50, "racecheck": 50}
BENCH_SECONDS = 200

MOST_WORKERS = 12  # of the tests: each has a CUDA context of half a gigabyte

#: What says most comes first.
BENCHMARKS = (
    "model",
    "pruned_attention",
    "prune_epilogue",
    "column_mean_attention",
    "cls_prune_tokens",
    "cls_scores",
    "attention",
    "prune_tokens",
    "select_tokens",
    "gather_tokens",
    "block",
    "training_step",
    "attention_backward",
    "scaling",
    "adapters",
    "exported",
    "wav_to_label",
)

#: A kernel is some 10 to 50 times as slow under the sanitizer, so of each some sizes, values and alignments.
SANITIZED = "device and (33 or 513 or any_bits or strided or any_order or out_of_range or 4112 or 7-1)"


def check_gpu():
    if torch.version.cuda is None:
        sys.exit(f"error: torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device: torch.cuda.is_available() is False (see nvidia-smi)")


def commands(benchmark_folder, arguments, limited=True):
    """The steps after the build: dict of name -> command, or why it cannot run (str)."""
    pytest = [sys.executable, "-m", "pytest"]
    parallel = ["-n", str(min(os.cpu_count(), MOST_WORKERS))] if find_spec("xdist") else []
    # Without pytest-benchmark bench/conftest.py measures the same.
    only = ["--benchmark-only"] if find_spec("pytest_benchmark") else []
    in_time = [f"--bench-seconds={BENCH_SECONDS}"] if limited else []
    files = [f"bench/cases/bench_{name}.py" for name in BENCHMARKS]
    steps = {
        "tests": [*pytest, "tests", "-m", "device", "--durations=15", *parallel],
        "benchmarks": [*pytest, *files, *only, *in_time, f"--bench-output={benchmark_folder}", *arguments],
    }
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        # PyTorch's kernels, which fill and copy the tensors, are not what is checked.
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
        options += ["--kernel-name", "kns=pruneattn"]
        test = [*pytest, "tests/csrc", "-k", SANITIZED]
        steps[tool] = [sanitizer, *options, *test] if sanitizer else "compute-sanitizer is not installed"
    return steps


def step(name, command, limit=None):
    """Runs a command, shows its output as it comes, and returns what the result file keeps of it.

    ``limit``: seconds after which the command is interrupted, and killed if that does not help.
    """
    if isinstance(command, str):
        print(f"== {name}: not run: {command}", flush=True)
        return {"ok": None, "tail": [f"not run: {command}"]}
    print(f"== {name}: {' '.join(map(str, command))}", flush=True)
    begin, tail, late = time.monotonic(), [], threading.Event()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    timer = threading.Timer(limit or threading.TIMEOUT_MAX, lambda: (late.set(), _stop(process)))
    timer.daemon = True
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            tail = [*tail[-19:], line.rstrip()]
        code = process.wait()
    finally:
        timer.cancel()
        _stop(process, patience=0)
    result = {"ok": code == 0 and not late.is_set(), "exit_code": code, "seconds": round(time.monotonic() - begin, 1)}
    if late.is_set():
        tail.append(f"stopped at the limit of {limit:g} seconds")
    return {**result, "stopped": late.is_set(), "tail": tail}


def _stop(process, patience=10.0):
    """End a command and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        if patience:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        os.killpg(process.pid, signal.SIGKILL)


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def take_benchmarks(result, folder, path):
    """Move what the benchmarks left in a folder into the result, and their table beside its file."""
    measured = next(iter(folder.glob("*.json")), None)
    if measured is not None:
        result |= json.loads(measured.read_text(encoding="utf-8"))
        shutil.copy(measured.with_suffix(".csv"), path.with_suffix(".csv"))
    shutil.rmtree(folder, ignore_errors=True)


def table(steps):
    """Lines that say how each step went."""
    words = {True: "ok", False: "FAILED", None: "not run"}
    for name, value in steps.items():
        last = next((line for line in reversed(value["tail"]) if line.strip()), "")
        yield f"{name:12}{words[value['ok']]:9}{value.get('seconds', 0):6.1f} s  {last[:120]}"


def main(arguments, results=RESULTS):
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_run", allow_abbrev=False)
    parser.add_argument("--no-limits", action="store_true", help="let every step take the time it takes")
    args, arguments = parser.parse_known_args(arguments)
    check_gpu()
    limits = {} if args.no_limits else LIMITS
    install = [sys.executable, "-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps"]
    steps = {"build": step("build", install, limits.get("build"))}
    machine = describe_machine("cuda")  # of the module that was just built
    result = {"schema": SCHEMA, "machine": machine, "rows": [], "steps": steps}
    path = results / f"gpu-{machine['date'][:19].replace(':', '')}.json"
    write(path, result)
    if steps["build"]["ok"]:
        folder = path.with_suffix("")  # of the benchmarks while they run
        for name, command in commands(folder, arguments, not args.no_limits).items():
            steps[name] = step(name, command, limits.get(name))
            if name == "benchmarks":
                take_benchmarks(result, folder, path)
                if not find_spec("pytest_benchmark"):
                    steps[name]["note"] = "without pytest-benchmark, which is not installed"
            write(path, result)
    print(
        f"\n== {machine['device_name']}, commit {machine['commit'][:12]}{'+changes' * machine['changed_files']}: {path}"
    )
    print("\n".join(table(steps)))
    return 1 if any(value["ok"] is False for value in steps.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
