import os
import re
import subprocess
import sys
from pathlib import Path

from pruneattn.data.toy import KINDS

ROOT = Path(__file__).parents[2]


def test_quickstart():
    """Run as a person would, in a process of its own, since it turns gradients off."""
    command = [sys.executable, "python/quickstart.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    output = run.stdout
    assert "patches kept: 64 -> 45 -> 32 -> 23" in output  # ceil of 0.7 of each
    assert "keep-rate 0.7: 0.243 GMACs a clip, 0.241 really computed" in output
    assert f"loaded again: same logits True, labels {', '.join(KINDS)}" in output
    assert "0 parameters missing, 0 unused" in output
    errors = re.findall(r"\d+e[-+]\d+", output)
    assert len(errors) == 3 and all(float(error) < 1e-5 for error in errors)
