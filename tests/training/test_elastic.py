"""torchrun restarts a run whose processes die, and the run ends like an uninterrupted run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pruneattn.errors import UserError
from pruneattn.runtime import distributed
from pruneattn.training.build import check_same_start

# Like `-m pruneattn.train`, but if DEATHS has a rank and an optimizer step for this start, the process of this rank
# kills itself at the beginning of this step.
DYING = """
import json, os, signal, time
from pruneattn.cli import run_command
from pruneattn.train import main
from pruneattn.runtime import distributed
from pruneattn.training.engine import Trainer

death = json.loads(os.environ["DEATHS"]).get(os.environ["TORCHELASTIC_RESTART_COUNT"])
train_step = Trainer.train_step

def step(self, batches):
    if death == [distributed.rank(), self.global_step]:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, batches)

Trainer.train_step = step
if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and os.environ["RANK"] == "1":
    time.sleep(3)  # the other process must not use values of the previous start in torchrun's store
run_command(main)
"""


@pytest.fixture
def torchrun(train):
    """``torchrun(name, *options, deaths, restarts)``: train in two processes; returns exit code and output."""
    script = train.root / "dying.py"
    script.write_text(DYING)

    def torchrun(name, *options, deaths, restarts=0):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", str(restarts), str(script)]
        command += train.arguments(name, *options, "--device", "cpu", "--save-minutes", 0, "--resume")
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DEATHS": json.dumps(deaths)}
        own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        run = subprocess.run(command, env=os.environ | own, stdout=subprocess.PIPE, text=True, timeout=240)
        return run.returncode, run.stdout

    return torchrun


@pytest.mark.slow
def test_a_run_whose_process_dies_ends_like_an_uninterrupted_run(train, torchrun):
    code, _ = torchrun("whole", deaths={})
    assert code == 0
    code, output = torchrun("cut", deaths={0: [0, 7]}, restarts=1)  # the process that saves, in the third epoch
    assert code == 0
    assert output.count("no checkpoint yet; starting from the beginning") == 1
    assert [output.count(f"epoch {epoch}/4:") for epoch in (1, 2, 3, 4)] == [1, 1, 1, 1]
    whole, cut = train.root / "whole", train.root / "cut"
    assert [line["step"] for line in train.log(cut, "step")] == list(range(1, 13))
    assert [line["epoch"] for line in train.log(cut, "epoch")] == list(range(4))
    train.assert_same(whole, cut)
    assert json.loads((cut / "config.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_one_process_resumes_the_run_of_two(train, plain, torchrun):
    code, _ = torchrun("fewer", *train.plain, deaths={0: [1, 7]})
    fewer = train.root / "fewer"
    progress = train.state(fewer)["progress"]
    assert code != 0 and (progress["epoch"], progress["step"]) == (2, 1)
    train("fewer", *train.plain, "--resume")
    for left, right in zip(train.log(plain), train.log(fewer), strict=True):
        assert left.keys() == right.keys()
        for key in ("loss", "lr", "train_loss", "val_loss", "map", "top1"):
            if key in left:  # each step has the same clips, but sums them in another order
                assert left[key] == pytest.approx(right[key], rel=1e-5, abs=1e-9), (key, left)
    left, right = train.state(plain)["model"], train.state(fewer)["model"]
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=2e-5, msg=name)


def test_processes_that_see_different_folders_are_rejected(monkeypatch):
    for starts in ([None, None], [(2, 1), (2, 1)]):
        monkeypatch.setattr(distributed, "gather_objects", lambda start, starts=starts: starts)
        check_same_start("runs/a", starts[0])
    monkeypatch.setattr(distributed, "gather_objects", lambda start: [(2, 1), None])
    message = "runs/a: .*process 0: epoch 2, step 1; process 1: nothing.*a folder that all machines share"
    with pytest.raises(UserError, match=message):
        check_same_start("runs/a", None)
