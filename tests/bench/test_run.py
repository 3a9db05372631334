"""Runs of the benchmarks, each in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness.rows import read_result

pytestmark = pytest.mark.harness

ROOT = Path(__file__).parents[2]
PLUGIN = """
import bench.cases.bench_select_tokens as module

module.topk = lambda scores, keep: scores.topk(keep).indices
"""


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    """Child processes of a worker of pytest-xdist would count as workers, where pytest-benchmark skips everything."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def test_a_wrong_provider_fails_the_run_after_everything_is_written(tmp_path):
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
    # A failed case is not measured again.
    assert run.returncode == 1 and "4 failed, 4 skipped" in run.stdout, run.stdout + run.stderr
    assert "torch.topk: wrong: the values of result 0" in run.stdout and f"written: {path}" in run.stdout


WITHOUT = """
import importlib.util

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pytest_benchmark" else find(name, *rest)
"""


def test_short_cases_are_measured_twice(tmp_path):
    """Without pytest-benchmark, pytest makes the same measurements."""
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


def test_no_case_starts_after_the_time_limit(tmp_path):
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
