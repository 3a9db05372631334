"""The best epoch of a run, and its list of failed clips."""

import math
import os

from pruneattn.report import FAILED, add_failed
from pruneattn.training.state import Progress


def test_best_epoch_has_the_better_metric_at_the_same_keep_rate():
    best = {"metric": 0.5, "keep_rate": [0.7, 0.7], "pruning": True}
    assert Progress().improves(0.0, [1.0, 1.0], False)
    assert Progress(best=best).improves(0.6, [0.7, 0.7], True)
    assert not Progress(best=best).improves(0.5, [0.7, 0.7], True)  # the first of two equal epochs
    assert not Progress(best=best).improves(math.nan, [0.7, 0.7], True)
    assert Progress(best=best | {"metric": math.nan}).improves(0.1, [0.7, 0.7], True)


def test_another_keep_rate_always_improves():
    best = {"metric": 0.9, "keep_rate": [1.0, 1.0], "pruning": False}
    assert Progress(best=best).improves(0.1, [0.9, 1.0], True)
    assert Progress(best=best).improves(0.1, [1.0, 1.0], True)  # the first epoch of the schedule


def test_list_of_failed_clips_grows(tmp_path):
    assert add_failed(tmp_path, []) == 0 and not (tmp_path / FAILED).exists()
    assert add_failed(tmp_path, [("b.wav", "the file is empty")]) == 1
    assert add_failed(tmp_path, [("b.wav", "the file is empty")]) == 0
    name = os.fsdecode(b"a\xe9.wav")
    assert add_failed(tmp_path, {(name, "no sound:\nno header")}) == 2
    assert add_failed(tmp_path, {(name, "no sound:\nno header"), ("b.wav", "the file is empty")}) == 0
    lines = (tmp_path / FAILED).read_text(encoding="utf-8").splitlines()
    assert lines == ["a\\udce9.wav: no sound: no header", "b.wav: the file is empty"]
