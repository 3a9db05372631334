"""The benchmarks as they are called, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu_run
from bench.rows import ResultFile, read_result, row_of

ROOT = Path(__file__).parents[2]
PLUGIN = """
import bench.bench_select_tokens as module

module.topk = lambda scores, keep: scores.topk(keep).indices
"""


def test_pytest_bench(tmp_path):
    """One op, of which one provider is wrong: the run goes on, writes everything, and fails."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "one_is_wrong.py").write_text(PLUGIN)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "pytest", "bench/bench_select_tokens.py", "--benchmark-only", "-p", "one_is_wrong",
        "--bench-rounds=1", "--bench-device=cpu", "--bench-threads=1", f"--bench-output={tmp_path / 'out'}",
    ]  # fmt: skip
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


def test_short_cases_are_measured_again(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/bench_gather_tokens.py", "--benchmark-only", "--bench-rounds=2"]
    command += ["--bench-device=cpu", "--bench-threads=1", f"--bench-output={tmp_path}", "-k", "1x65"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "2 passed" in run.stdout, run.stdout + run.stderr
    (path,) = tmp_path.glob("*.json")
    rows = read_result(path)[1]
    assert len(rows) == 3 and {row["rounds"] for row in rows} == {4}


def test_steps_of_a_gpu_run(tmp_path):
    measured = ResultFile(tmp_path / "measured", "gpu", {"date": "2026-01-02T03:04:05"})
    measured.add([row_of(provider="ours", status="ok")])
    (tmp_path / "results").mkdir()
    path = gpu_run.write_with_steps({"tests": {"ok": False}}, measured.path, tmp_path / "results")
    assert path.name == "gpu-2026-01-02T030405.json" and path.with_suffix(".csv").exists()
    assert read_result(path)[1][0]["provider"] == "ours" and '"ok": false' in path.read_text()


def test_a_step_keeps_what_it_said():
    result = gpu_run.step("it", [sys.executable, "-c", "print('one'); print('two'); raise SystemExit(3)"])
    assert (result["ok"], result["exit_code"], result["tail"]) == (False, 3, ["one", "two"])
