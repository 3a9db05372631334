"""Under torchrun a run whose processes die is started again, and ends as if nothing had happened."""

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
from pruneattn.training.engine import Trainer

# As `-m pruneattn.train`, but in the starts for which DEATHS has a rank and an optimiser step, that process kills itself
# at the beginning of that step.
DYING = """
import json, os, signal, time
from pruneattn.errors import run_command
from pruneattn.train import main
from pruneattn.training import distributed
from pruneattn.training.engine import Trainer

death = json.loads(os.environ["DEATHS"]).get(os.environ["TORCHELASTIC_RESTART_COUNT"])
train_step = Trainer.train_step

def step(self, batches):
    if death == [distributed.rank(), self.global_step]:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, batches)

Trainer.train_step = step
if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and os.environ["RANK"] == "1":
    time.sleep(3)  # the others must not take what the start before left in torchrun's store for this one's
run_command(main)
"""


@pytest.fixture
def torchrun(train):
    """``torchrun(name, *options, deaths, restarts)``: train in two processes; the exit code and what was printed."""
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


def test_a_process_dies_and_the_run_ends_as_if_uninterrupted(train, torchrun):
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


def test_one_process_goes_on_with_the_run_of_two(train, torchrun):
    one = train("one", *train.plain)
    code, _ = torchrun("fewer", *train.plain, deaths={0: [1, 7]})
    fewer = train.root / "fewer"
    progress = train.state(fewer)["progress"]
    assert code != 0 and (progress["epoch"], progress["step"]) == (2, 1)
    train("fewer", *train.plain, "--resume")
    for left, right in zip(train.log(one), train.log(fewer), strict=True):
        assert left.keys() == right.keys()
        for key in ("loss", "lr", "train_loss", "val_loss", "map", "top1"):
            if key in left:  # of the same clips in every step, summed in another order
                assert left[key] == pytest.approx(right[key], rel=1e-5, abs=1e-9), (key, left)
    left, right = train.state(one)["model"], train.state(fewer)["model"]
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=2e-5, msg=name)


def test_resume_begins_again_what_left_no_checkpoint(train, monkeypatch):
    def dying(self, batches):
        raise RuntimeError("died")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="died"):
        patch.setattr(Trainer, "train_step", dying)
        train("cut", "--resume")
    assert (train.root / "cut" / "config.json").exists()
    train.assert_same(train("whole"), train("cut", "--resume"))


def test_resume_branches_where_there_is_no_checkpoint_yet(train, capsys):
    options = ["--keep-rate", 0.25, "--branch-from", train("first") / "trunk.pt"]
    branch = train("branch", *options)
    elastic = train("elastic", *options, "--resume")
    assert f"no checkpoint yet; starting from {options[-1]}" in capsys.readouterr().out
    train.assert_same(branch, elastic)
    (elastic / "result.json").unlink()
    before = (elastic / "last.pt").stat().st_mtime_ns
    train("elastic", *options, "--resume")  # finished: reports again, trains nothing
    assert (elastic / "last.pt").stat().st_mtime_ns == before
    train.assert_same(branch, elastic)


def test_restarts_that_would_hang_are_refused(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "TORCHELASTIC_MAX_RESTARTS": 3}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: None)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        distributed.start("cpu")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    distributed.start("cpu")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    distributed.start("cpu")


def test_processes_that_see_different_folders_are_refused(monkeypatch):
    for starts in ([None, None], [(2, 1), (2, 1)]):
        monkeypatch.setattr(distributed, "gather_objects", lambda start, starts=starts: starts)
        check_same_start("runs/a", starts[0])
    monkeypatch.setattr(distributed, "gather_objects", lambda start: [(2, 1), None])
    message = "runs/a: .*process 0: epoch 2, step 1; process 1: nothing.*one folder that all machines share"
    with pytest.raises(UserError, match=message):
        check_same_start("runs/a", None)
