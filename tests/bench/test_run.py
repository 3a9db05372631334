"""The benchmarks as they are called, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness.machine import describe_machine
from bench.harness.rows import ResultFile, read_result, row_of
from tools import gpu_run

ROOT = Path(__file__).parents[2]
PLUGIN = """
import bench.cases.bench_select_tokens as module

module.topk = lambda scores, keep: scores.topk(keep).indices
"""


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    """Benchmarks are left out in a worker of pytest-xdist, as which a process that it starts would count."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def test_pytest_bench(tmp_path):
    """One op, of which one provider is wrong: the run goes on, writes everything, and fails."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "one_is_wrong.py").write_text(PLUGIN)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/cases/bench_select_tokens.py",
        "--benchmark-only",
        "-p",
        "one_is_wrong",
        "--bench-rounds=1",
        "--bench-device=cpu",
        "--bench-threads=1",
        f"--bench-output={tmp_path / 'out'}",
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (path,) = (tmp_path / "out").glob("*.json")
    machine, rows = read_result(path)
    assert machine["threads"] == 1 and machine["peaks"]["copy"] > 0 and path.with_suffix(".csv").exists()
    status = {row["provider"]: row["status"] for row in rows}
    assert status == {"ours": "ok", "torch.topk": "wrong: the values of result 0 are not the reference's"}
    assert {(row["batch"], row["tokens"]) for row in rows} == {(1, 65), (1, 513), (4, 65), (4, 513)}
    # What is wrong is not measured again.
    assert run.returncode == 1 and "4 failed, 4 skipped" in run.stdout, run.stdout + run.stderr
    assert "torch.topk: wrong: the values of result 0" in run.stdout and f"written: {path}" in run.stdout


WITHOUT = """
import importlib.util

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pytest_benchmark" else find(name, *rest)
"""


def test_short_cases_are_measured_again(tmp_path):
    """By pytest alone: without pytest-benchmark the same is measured."""
    (tmp_path / "without.py").write_text(WITHOUT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/cases/bench_gather_tokens.py",
        "-p",
        "no:benchmark",
        "-p",
        "without",
    ]
    command += [
        "--bench-device=cpu",
        "--bench-threads=1",
        "--bench-rounds=2",
        f"--bench-output={tmp_path}",
        "-k",
        "1x65",
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "2 passed" in run.stdout, run.stdout + run.stderr
    (path,) = tmp_path.glob("*.json")
    rows = read_result(path)[1]
    assert len(rows) == 3 and {row["rounds"] for row in rows} == {4}


def test_no_case_begins_when_the_time_is_over(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/cases/bench_gather_tokens.py",
        "--benchmark-only",
        "--bench-seconds=0",
    ]
    command += ["--bench-device=cpu", "--bench-threads=1", f"--bench-output={tmp_path}", "-k", "1x65"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "2 skipped" in run.stdout, run.stdout + run.stderr


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """``gpu(name=program, ...)``: exit code of a run on a machine with a GPU, with small programs for its steps."""
    monkeypatch.setattr(gpu_run, "check_gpu", lambda: None)
    machine = {**describe_machine("cpu"), "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "changed_files": True}
    monkeypatch.setattr(gpu_run, "describe_machine", lambda device: machine)

    def say(code):
        return [sys.executable, "-c", code]

    def run(build=True, **steps):
        monkeypatch.setattr(gpu_run, "LIMITS", {"tests": 1.0})
        step = gpu_run.step
        monkeypatch.setattr(
            gpu_run,
            "step",
            lambda name, command, limit: (
                {"ok": build, "tail": ["built"]} if name == "build" else step(name, command, limit)
            ),
        )
        measured = ResultFile(tmp_path / "gpu-2026-01-02T030405", "gpu", {"date": "2026-01-02T03:05:00", "peaks": 1})
        measured.add([row_of(provider="ours", status="ok")])
        monkeypatch.setattr(
            gpu_run,
            "commands",
            lambda *_: {name: say(code) if code != "missing" else "it is not here" for name, code in steps.items()},
        )
        return gpu_run.main([], tmp_path)

    return run


def test_steps_of_a_gpu_run(gpu, tmp_path, capfd):
    """One is stopped, one fails, one is not there: all others run, and the file has them all and the benchmarks."""
    steps = {"tests": "import time; print('begun', flush=True); time.sleep(60)", "benchmarks": "print('measured')"}
    steps |= {"memcheck": "missing", "racecheck": "print('a race'); raise SystemExit(9)"}
    assert gpu(**steps) == 1
    (path,) = tmp_path.glob("*.json")
    assert path.name == "gpu-2026-01-02T030405.json" and path.with_suffix(".csv").exists()
    assert list(tmp_path.iterdir()).count(path.with_suffix("")) == 0
    machine, rows = read_result(path)
    assert rows[0]["provider"] == "ours" and machine["peaks"] == 1
    said = json.loads(path.read_text())["steps"]
    assert [said[name]["ok"] for name in ("build", *steps)] == [True, False, True, None, False]
    assert said["tests"]["stopped"] and said["tests"]["seconds"] < 30
    assert said["tests"]["tail"][0] == "begun" and said["tests"]["tail"][-1] == "stopped at the limit of 1 seconds"
    lines = capfd.readouterr().out.splitlines()[-6:]
    assert lines[0].endswith(f"commit abc+changes: {path}")
    assert [line.split()[0] for line in lines[1:]] == ["build", *steps]
    assert "FAILED" in lines[2] and lines[2].endswith("stopped at the limit of 1 seconds")
    assert "not run" in lines[4] and lines[4].endswith("it is not here") and lines[5].endswith("a race")


def test_a_gpu_run_that_cannot_build(gpu, tmp_path):
    assert gpu(build=False, tests="print('never')") == 1
    (path,) = tmp_path.glob("*.json")
    assert list(json.loads(path.read_text())["steps"]) == ["build"]


def test_commands_of_a_gpu_run(monkeypatch):
    """They name files that are there, and tests that exist."""
    monkeypatch.setattr(gpu_run.shutil, "which", lambda name: f"/bin/{name}")
    commands = gpu_run.commands("out", ["--bench-hot"])
    assert list(commands) == ["tests", "benchmarks", "memcheck", "racecheck"]
    assert {Path(ROOT, part) for part in commands["benchmarks"] if part.endswith(".py")} == set(
        ROOT.glob("bench/cases/bench_*.py")
    )
    assert commands["benchmarks"][-1] == "--bench-hot" and commands["racecheck"][0] == "/bin/compute-sanitizer"
    collect = [*commands["memcheck"][commands["memcheck"].index(sys.executable) :], "--collect-only"]
    found = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    tests = [line for line in found if "::" in line]
    assert all("device" in line for line in tests)
    for name in ("select", "gather", "prune", "strided", "special_values"):
        assert any(name in line for line in tests), name


def test_a_step_keeps_what_it_said():
    result = gpu_run.step("it", [sys.executable, "-c", "print('one'); print('two'); raise SystemExit(3)"])
    assert (result["ok"], result["exit_code"], result["tail"]) == (False, 3, ["one", "two"])
