"""`make gpu`: build, tests, benchmarks and sanitizer on this machine's CUDA device, with one result file.

The steps are the tests that use a device (``-m device``), the small grid of the benchmarks, and compute-sanitizer with
some tests of the CUDA kernels. Each step has a time limit (`LIMITS`, eleven minutes in total). A step that reaches it
is stopped and marked as stopped, and the next step starts. ``python -m tools.gpu_run --no-limits --bench-full`` runs
without limits. All options except ``--no-limits`` are passed to the benchmarks.

The result file ``bench/results/gpu-<date>.json`` contains the benchmarks' result, and the exit code and last lines of
each step. It is written after every step. The table at the end names the steps that failed; the exit code is then 1.
The steps need pytest, pybind11, ninja and setuptools in this Python. With pytest-xdist the tests run in parallel. The
steps import the package from this folder, even if this Python does not find editable installations.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.harness.machine import RESULTS, ROOT, describe_machine
from bench.harness.rows import SCHEMA
from pruneattn.files import atomic_write

#: Seconds after which a step is stopped. The benchmarks start no case after `BENCH_SECONDS`.
LIMITS = {"build": 180, "tests": 130, "benchmarks": 240, "memcheck": 50, "racecheck": 50}
BENCH_SECONDS = 200

#: Processes of the tests; each has a CUDA context of half a gigabyte.
MOST_WORKERS = 12

#: The most informative benchmarks first, because the time limit can end the run.
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

#: Benchmarks of kernels and engines that run on the CPU only.
CPU_ONLY = ("int8_linear", "precision", "whisper")

#: Tests that run under the sanitizer: some sizes, values and alignments of each kernel, which is 10 to 50 times slower.
SANITIZED = "device and (33 or 513 or any_bits or strided or any_order or out_of_range or 4112 or 7-1)"


def check_gpu() -> None:
    """Exit with a message if there is no usable CUDA device."""
    if torch.version.cuda is None:
        sys.exit(f"error: torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device: torch.cuda.is_available() is False (see nvidia-smi)")


def commands(
    benchmark_folder: str | Path, arguments: Sequence[str], limited: bool = True
) -> dict[str, list[str] | str]:
    """List the steps after the build.

    Args:
        benchmark_folder: folder for the result of the benchmarks.
        arguments: further arguments of the benchmarks.
        limited: whether the benchmarks have a time limit.

    Returns:
        dict of name -> command, or the reason (str) why the step cannot run.
    """
    pytest = [sys.executable, "-m", "pytest"]
    parallel = ["-n", str(min(os.cpu_count(), MOST_WORKERS))] if find_spec("xdist") else []
    # Without pytest-benchmark, bench/conftest.py makes the same measurements.
    only = ["--benchmark-only"] if find_spec("pytest_benchmark") else []
    in_time = [f"--bench-seconds={BENCH_SECONDS}"] if limited else []
    files = [f"bench/cases/bench_{name}.py" for name in BENCHMARKS]
    steps: dict[str, list[str] | str] = {
        "tests": [*pytest, "tests", "-m", "device", "--durations=15", *parallel],
        "benchmarks": [*pytest, *files, *only, *in_time, f"--bench-output={benchmark_folder}", *arguments],
    }
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        # PyTorch's kernels, which fill and copy tensors, are not checked.
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
        options += ["--kernel-name", "kns=pruneattn"]
        test = [*pytest, "tests/csrc", "-k", SANITIZED]
        steps[tool] = [sanitizer, *options, *test] if sanitizer else "compute-sanitizer is not installed"
    return steps


def step(name: str, command: Sequence[str] | str, limit: float | None = None) -> dict[str, Any]:
    """Run a command and print its output.

    Args:
        name: name of the step.
        command: the command, or the reason (str) why it cannot run.
        limit: seconds after which the command is interrupted, and killed if it does not end.

    Returns:
        The step's entry in the result file.
    """
    if isinstance(command, str):
        print(f"== {name}: not run: {command}", flush=True)
        return {"ok": None, "tail": [f"not run: {command}"]}
    print(f"== {name}: {' '.join(map(str, command))}", flush=True)
    begin, late = time.monotonic(), threading.Event()
    tail: list[str] = []
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
    assert process.stdout is not None

    def stop_late() -> None:
        late.set()
        _stop(process)

    timer = threading.Timer(limit or threading.TIMEOUT_MAX, stop_late)
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


def _stop(process: subprocess.Popen, patience: float = 10.0) -> None:
    """Interrupt a command and all its child processes, and kill them after `patience` seconds."""
    with suppress(ProcessLookupError, PermissionError):
        if patience:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        os.killpg(process.pid, signal.SIGKILL)


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def take_benchmarks(result: dict[str, Any], folder: Path, path: Path) -> None:
    """Move the result of the benchmarks from `folder` into `result`, and their CSV table next to the result file."""
    measured = next(iter(folder.glob("*.json")), None)
    if measured is not None:
        result |= json.loads(measured.read_text(encoding="utf-8"))
        shutil.copy(measured.with_suffix(".csv"), path.with_suffix(".csv"))
    shutil.rmtree(folder, ignore_errors=True)


def table(steps: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each step: outcome, time and last line of output."""
    words = {True: "ok", False: "FAILED", None: "not run"}
    for name, value in steps.items():
        last = next((line for line in reversed(value["tail"]) if line.strip()), "")
        yield f"{name:12}{words[value['ok']]:9}{value.get('seconds', 0):6.1f} s  {last[:120]}"


def main(arguments: Sequence[str], results: Path = RESULTS) -> int:
    """Run all steps and write the result file.

    Args:
        arguments: options of the command.
        results: folder of the result file.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_run", allow_abbrev=False)
    parser.add_argument("--no-limits", action="store_true", help="run all steps without time limits")
    args, arguments = parser.parse_known_args(arguments)
    check_gpu()
    limits = {} if args.no_limits else LIMITS
    install = [sys.executable, "-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps"]
    steps = {"build": step("build", install, limits.get("build"))}
    machine = describe_machine("cuda")  # after the build, because it describes the new extension
    result: dict[str, Any] = {"schema": SCHEMA, "machine": machine, "rows": [], "steps": steps}
    path = results / f"gpu-{machine['date'][:19].replace(':', '')}.json"
    write(path, result)
    if steps["build"]["ok"]:
        folder = path.with_suffix("")  # for the result of the benchmarks while they run
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
