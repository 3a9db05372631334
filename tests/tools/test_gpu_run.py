"""The steps of `make gpu`, and the file that they write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness.machine import describe_machine
from bench.harness.rows import ResultFile, read_result, row_of
from tools import gpu_run

pytestmark = pytest.mark.harness

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """``gpu(name=program, ...)`` runs small programs as the steps, as with a GPU, and returns the exit code."""
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
            lambda *_: {name: say(code) if code != "missing" else "is not installed" for name, code in steps.items()},
        )
        return gpu_run.main([], tmp_path)

    return run


def test_all_steps_run_and_are_in_the_result_file(gpu, tmp_path, capfd):
    """Also if one step is stopped, one fails and one cannot run."""
    steps = {"tests": "import time; print('started', flush=True); time.sleep(60)", "benchmarks": "print('measured')"}
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
    assert said["tests"]["tail"][0] == "started" and said["tests"]["tail"][-1] == "stopped at the limit of 1 seconds"
    lines = capfd.readouterr().out.splitlines()[-6:]
    assert lines[0].endswith(f"commit abc+changes: {path}")
    assert [line.split()[0] for line in lines[1:]] == ["build", *steps]
    assert "FAILED" in lines[2] and lines[2].endswith("stopped at the limit of 1 seconds")
    assert "not run" in lines[4] and lines[4].endswith("is not installed") and lines[5].endswith("a race")


def test_no_step_runs_after_a_failed_build(gpu, tmp_path):
    assert gpu(build=False, tests="print('never')") == 1
    (path,) = tmp_path.glob("*.json")
    assert list(json.loads(path.read_text())["steps"]) == ["build"]


def test_commands_name_existing_files_and_tests(monkeypatch):
    monkeypatch.setattr(gpu_run.shutil, "which", lambda name: f"/bin/{name}")
    commands = gpu_run.commands("out", ["--bench-hot"])
    assert list(commands) == ["tests", "benchmarks", "memcheck", "racecheck"]
    of_the_cpu = {ROOT / "bench" / "cases" / f"bench_{name}.py" for name in gpu_run.CPU_ONLY}
    everything = set(ROOT.glob("bench/cases/bench_*.py"))
    assert of_the_cpu < everything
    assert {Path(ROOT, part) for part in commands["benchmarks"] if part.endswith(".py")} == everything - of_the_cpu
    assert commands["benchmarks"][-1] == "--bench-hot" and commands["racecheck"][0] == "/bin/compute-sanitizer"
    collect = [*commands["memcheck"][commands["memcheck"].index(sys.executable) :], "--collect-only"]
    # Without a GPU there are no tests of the device, but each has a twin under emulation.
    collect = [part.replace("device and", "(device or emulated) and") for part in collect]
    found = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    tests = [line for line in found if "::" in line]
    for name in ("select", "gather", "prune", "strided", "special_values"):
        assert any(name in line for line in tests), name


def test_the_result_of_a_step_has_its_output():
    result = gpu_run.step("it", [sys.executable, "-c", "print('one'); print('two'); raise SystemExit(3)"])
    assert (result["ok"], result["exit_code"], result["tail"]) == (False, 3, ["one", "two"])
