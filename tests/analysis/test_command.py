import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pruneattn.analysis.command import example_indices
from pruneattn.errors import UserError


def analysis_of(classes, limit=None):
    """An analysis of one clip per class number."""
    clips = [SimpleNamespace(path=Path(f"class{c}", f"{i}.wav"), labels=(c,)) for i, c in enumerate(classes)]
    dataset = SimpleNamespace(clips=clips, name="toy")
    return SimpleNamespace(dataset=dataset, args=SimpleNamespace(batch_size=4, limit=limit))


def test_examples_are_spread_over_clips_and_classes():
    taking_turns = analysis_of([i % 10 for i in range(40)])
    assert example_indices(taking_turns, 4) == [0, 11, 22, 33]  # every tenth would be the same class each time
    one_class = analysis_of([3] * 10)
    assert example_indices(one_class, 3) == [0, 3, 6]
    assert example_indices(one_class, 30) == list(range(10))
    assert example_indices(analysis_of(range(10), limit=5), 5) == [0, 2, 4, 6, 8]


def test_examples_by_name():
    analysis = analysis_of([0, 0, 1, 1, 2, 2, 1, 0])
    assert example_indices(analysis, 2, ["class1"]) == [2, 3]  # of 2, 3, 6
    assert example_indices(analysis, 9, ["class2", "0.wav"]) == [0, 4, 5]
    assert example_indices(analysis, 2, ["class1", "class2"]) == [2, 4]
    with pytest.raises(UserError, match="--match dog cat: no clip of toy has that in its path"):
        example_indices(analysis, 2, ["dog", "cat"])


def test_clips_that_cannot_be_read_are_said_and_listed(analysis_run, analysis_script, analysis_clips, tmp_path, capsys):
    pytest.importorskip("sklearn")
    run, data = analysis_run("ast"), tmp_path / "clips"
    shutil.copytree(analysis_clips, data)
    (data / "test" / "buzz" / "broken.wav").write_text("no sound")
    run.data = data
    analysis_script("clusters").main(run.options(tmp_path / "out"))
    text = capsys.readouterr().out
    assert "1 of 8 clips could not be read" in text and text.count("broken.wav") == 1
    assert "broken.wav" in (tmp_path / "out" / "failed_clips.txt").read_text()
    run.data = analysis_clips
    analysis_script("clusters").main(run.options(tmp_path / "out"))
    assert not (tmp_path / "out" / "failed_clips.txt").exists() and "could not" not in capsys.readouterr().out
