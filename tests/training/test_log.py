"""Logs of a run."""

import errno
import json

import pytest

from pruneattn.training.log import RunLog


@pytest.mark.parametrize("method", ["__init__", "add_scalar"])
def test_full_disk_under_tensorboard_does_not_end_a_run(tmp_path, monkeypatch, capsys, method):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorboard.SummaryWriter, method, full)
    log = RunLog(tmp_path)
    for step in range(3):
        log.write("step", step, loss=1.0)
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 1, 2]
    message = f"warning: cannot write {tmp_path / 'tensorboard'}: No space left on device; the run continues without"
    assert capsys.readouterr().out.count(message) == 1
