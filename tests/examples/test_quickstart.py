import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pruneattn.data.toy import KINDS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "python" / "quickstart.py"


def check(output):
    assert "patches kept: 64 -> 45 -> 32 -> 23" in output  # 0.7 of each, rounded up
    assert "keep-rate 0.7: 0.243 GMACs per clip, 0.241 computed" in output
    assert "without pruning" in output and "logits change by 0%" not in output
    assert f"loaded again: same logits True, labels {', '.join(KINDS)}" in output
    assert "0 parameters missing, 0 unused" in output
    errors = re.findall(r"\d+e[-+]\d+", output)
    assert len(errors) == 3 and all(float(error) < 1e-5 for error in errors)


def test_quickstart_prints_its_results(capsys):
    try:
        with torch.random.fork_rng():
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        torch.set_grad_enabled(True)  # the script disables gradients
    check(capsys.readouterr().out)


@pytest.mark.slow
def test_quickstart_runs_in_a_process():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    check(run.stdout)
