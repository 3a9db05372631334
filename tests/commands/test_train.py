"""``pruneattn train``: exit codes. tests/training tests the runs."""

import signal
from types import SimpleNamespace

import pytest

from pruneattn import train
from pruneattn.training import run as training_run
from pruneattn.training.engine import Stopped


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (None, 0, ""),
        (Stopped(signal.SIGTERM, "step 3 is saved"), 128 + 15, "run the same command with --resume"),
        (KeyboardInterrupt(), 128 + 2, "nothing new is saved"),
    ],
)
def test_the_exit_code_says_how_the_run_ended(monkeypatch, capsys, outcome, code, message):
    done = []

    def run():
        done.append("run")
        if outcome is not None:
            raise outcome

    log = SimpleNamespace(close=lambda: done.append("close"))
    trainer = SimpleNamespace(run=run, report=lambda: done.append("report"), log=log)
    monkeypatch.setattr(training_run, "build_trainer", lambda options, recipe, stop, lock: trainer)
    assert train.main(["--dataset", "toy"]) == code
    assert done == ["run", *(["report"] if code == 0 else []), "close"]
    assert message in capsys.readouterr().out
