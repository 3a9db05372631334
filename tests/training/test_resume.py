"""A run that is stopped or killed at any time can be resumed, and ends like an uninterrupted run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from pruneattn.errors import UserError
from pruneattn.files import locked
from pruneattn.runtime import distributed
from pruneattn.training.engine import Trainer


@pytest.fixture
def at_step(monkeypatch):
    """Call a function at the beginning of a given optimizer step (from 1) of a run in this process."""

    def install(step, action):
        original = Trainer.train_step

        def train_step(self, batches):
            if self.global_step + 1 == step:
                action()
            return original(self, batches)

        monkeypatch.setattr(Trainer, "train_step", train_step)

    return install


@pytest.mark.slow
def test_a_run_killed_within_an_epoch_resumes(train, whole):
    cut = train.root / "cut"
    command = [sys.executable, "-m", "pruneattn.train", *train.arguments("cut", "--save-minutes", 0, "--resume")]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not ((cut / "log.jsonl").exists() and (cut / "log.jsonl").read_bytes().count(b'"step"') > 7):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    progress = train.state(cut)["progress"]
    assert progress["epoch"] < 4
    train("cut", "--save-minutes", 0, "--resume")
    train.assert_same(whole, cut)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
@pytest.mark.slow
def test_a_killed_worker_is_reported_in_one_line(train):
    """For example if the system runs out of memory."""
    options = ["--workers", 1, "--epochs", 200, "--keep-rate", 1, "--save-minutes", 0, "--resume"]
    command = [sys.executable, "-m", "pruneattn.train", *train.arguments("cut", *options)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    while not (train.root / "cut" / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    while process.poll() is None:  # between two epochs there are no workers
        with open(children) as file, contextlib.suppress(ProcessLookupError):
            for pid in file.read().split():
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)
    error = process.communicate()[1]
    assert process.returncode == 1 and "Traceback" not in error
    assert "DataLoader worker" in error and "fewer --workers" in error


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_between_two_steps(train, whole, at_step, monkeypatch, signum, capsys):
    before = signal.getsignal(signum)
    at_step(5, lambda: os.kill(os.getpid(), signum))
    cut = train("cut", code=128 + signum)
    assert "--resume" in capsys.readouterr().out
    progress = train.state(cut)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    assert signal.getsignal(signum) == before
    monkeypatch.undo()
    train("cut", "--resume")
    train.assert_same(whole, cut)


def test_resume_within_an_epoch_of_accumulated_batches(train, at_step, monkeypatch):
    """A step then has several batches of the loader."""
    options = ["--accumulate", 3, "--epochs", 1, "--keep-rate", 1]
    uninterrupted = train("uninterrupted", *options)
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train("cut", *options, code=128 + signal.SIGTERM)
    monkeypatch.undo()
    train.assert_same(uninterrupted, train("cut", *options, "--resume"))


def test_signal_of_another_process_stops_the_run(train, whole, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "gather_numbers", lambda values: [values, [values[0] + 2, signal.SIGTERM]])
    cut = train("cut", code=128 + signal.SIGTERM)
    assert "stopped by SIGTERM; saved in epoch 0 after step 1 of 3" in capsys.readouterr().out
    monkeypatch.undo()
    loss = train.log(cut, "step")[0]["loss"]
    assert loss == pytest.approx(train.log(whole, "step")[0]["loss"] + 1)  # the mean of both processes


def test_signal_during_evaluation(train, whole, monkeypatch):
    original = Trainer.evaluate

    def evaluate(self, dataset):
        if self.progress.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, dataset)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    cut = train("cut", code=128 + signal.SIGTERM)
    assert train.state(cut)["progress"]["step"] == 3 and len(train.log(cut, "epoch")) == 2
    monkeypatch.undo()
    train("cut", "--resume")
    train.assert_same(whole, cut)


@pytest.mark.parametrize(
    "changes",
    [
        "--score cls --shrink-epochs 1",
        pytest.param("--keep-rate 0.25", marks=pytest.mark.slow),
        pytest.param("--keep-rate 1", marks=pytest.mark.slow),
    ],
)
def test_branch_equals_training_from_scratch(train, whole, changes):
    trunk = whole / "trunk.pt"
    scratch = train("scratch", *changes.split())
    branch = train("branch", *changes.split(), "--branch-from", trunk)
    train.assert_same(scratch, branch)
    assert (scratch / "trunk.pt").exists() and len(train.log(branch, "epoch")) == 4


def test_resume_starts_a_run_that_left_no_checkpoint(train, whole, monkeypatch):
    def dying(self, batches):
        raise RuntimeError("died")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="died"):
        patch.setattr(Trainer, "train_step", dying)
        train("cut", "--resume")
    assert (train.root / "cut" / "config.json").exists()
    train.assert_same(whole, train("cut", "--resume"))


def test_resume_branches_if_there_is_no_checkpoint_yet(train, whole, capsys):
    options = ["--keep-rate", 0.25, "--branch-from", whole / "trunk.pt"]
    branch = train("branch", *options)
    elastic = train("elastic", *options, "--resume")
    assert f"no checkpoint yet; starting from {options[-1]}" in capsys.readouterr().out
    train.assert_same(branch, elastic)
    (elastic / "result.json").unlink()
    before = (elastic / "last.pt").stat().st_mtime_ns
    train("elastic", *options, "--resume")  # finished: reports again, without training
    assert (elastic / "last.pt").stat().st_mtime_ns == before
    train.assert_same(branch, elastic)


def test_branch_and_resume_reject_another_configuration(train, short):
    first = train.copy(short, "first")
    with pytest.raises(UserError, match=r"lr: 0\.003 -> 0\.1"):
        train("first", *train.short, "--lr", 0.1, "--resume")
    with pytest.raises(UserError, match=r"epochs: 2 -> 5.*shrink_epochs: 0 -> 2"):
        train("first", "--epochs", 5, "--resume")
    with pytest.raises(UserError, match=r"epochs: 2 -> 4"):
        train("branch", "--branch-from", first / "trunk.pt")
    with pytest.raises(UserError, match="nothing.pt: checkpoint not found"):
        train("branch", "--branch-from", first / "nothing.pt")
    before = (first / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match="first already contains a run: resume it with --resume"):
        train("first", *train.short)
    assert (first / "log.jsonl").read_bytes() == before


def test_branch_and_resume_reject_other_clips_and_labels(train, tagged, clips, tmp_path):
    options = [*tagged, "--mean", -9, "--std", 3]
    first = train("first", *options, *train.short)

    def rejected(message, *changes):
        for start in (["--resume", first], ["--branch-from", first / "trunk.pt"]):
            with pytest.raises(UserError, match=message):
                train("other", *options, *train.short, *changes, *start)

    swapped = (clips / "class_labels_indices.csv").read_text().replace("0,/m/high,high", "1,/m/high,high")
    swapped = swapped.replace("1,/m/low,low", "0,/m/low,low")
    (tmp_path / "swapped.csv").write_text(swapped)
    rejected(
        r"labels: \['high', 'low', 'middle'\] -> \['low', 'high', 'middle'\]", "--label-csv", tmp_path / "swapped.csv"
    )
    for split in ("train", "val"):
        manifest = json.loads((clips / f"{split}.json").read_text())
        manifest["data"][-1]["labels"] = "/m/high,/m/low"
        (clips / "changed.json").write_text(json.dumps(manifest))
        rejected(f"only .* may differ.*: {split}_clips_digest: ", f"--{split}-manifest", clips / "changed.json")


def test_checkpoint_of_the_first_versions_resumes(train, short):
    """They contain no description of the clips."""
    first = train.copy(short, "first")
    checkpoint = train.state(first)
    for name in ("labels", "train_clips_digest", "val_clips_digest"):
        del checkpoint["config"][name]
    torch.save(checkpoint, first / "last.pt")
    train("first", *train.short, "--resume")


def test_resume_by_path_and_when_finished(train, short):
    first = train.copy(short, "first")
    before = train.state(first)
    result = json.loads((first / "result.json").read_text())
    (first / "result.json").unlink()
    train("elsewhere", *train.short, "--resume", first)
    assert json.loads((first / "result.json").read_text()) == result
    assert not (train.root / "elsewhere").exists()
    assert torch.equal(train.state(first)["model"]["head.weight"], before["model"]["head.weight"])


def test_damaged_checkpoint_is_named(train, short):
    first = train.copy(short, "first")
    data = (first / "last.pt").read_bytes()
    (first / "last.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"last\.pt: not a checkpoint.*or damaged"):
        train("first", *train.short, "--resume")


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_a_second_run_in_the_same_folder_is_rejected(train, options):
    pytest.importorskip("fcntl")
    folder = train.root / "run"
    folder.mkdir()
    with (
        locked(folder, "wait"),  # as a run in another process does
        pytest.raises(UserError, match="run: another process is writing there; .*choose another folder with --output"),
    ):
        train("run", *options)
    assert list(folder.iterdir()) == []
    train("run", *train.short, *options)
    with locked(folder, "wait"):  # a run that has ended holds no lock
        pass
