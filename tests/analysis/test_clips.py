import shutil
from pathlib import Path

import pytest
import torch

from pruneattn.analysis.clips import Analysis, describe_data, example_indices, iterate_clips
from pruneattn.data import load_audio
from pruneattn.data.clips import Clip, ClipDataset
from pruneattn.errors import UserError

LABELS = ["buzz", "siren", "tone"]


def analysis_of(classes, limit=None):
    """An analysis of one clip per class number."""
    clips = [Clip(Path(f"class{c}", f"{i}.wav"), (c,)) for i, c in enumerate(classes)]
    dataset = ClipDataset("toy", clips, [str(c) for c in range(10)], multilabel=False)
    return Analysis(None, dataset, torch.device("cpu"), "toy, test", batch_size=4, limit=limit)


def test_examples_are_spread_over_clips_and_classes():
    alternating = analysis_of([i % 10 for i in range(40)])
    assert example_indices(alternating, 4) == [0, 11, 22, 33]  # every tenth would be the same class
    one_class = analysis_of([3] * 10)
    assert example_indices(one_class, 3) == [0, 3, 6]
    assert example_indices(one_class, 30) == list(range(10))
    assert example_indices(analysis_of(range(10), limit=5), 5) == [0, 2, 4, 6, 8]


def test_examples_by_name():
    analysis = analysis_of([0, 0, 1, 1, 2, 2, 1, 0])
    assert example_indices(analysis, 2, ["class1"]) == [2, 3]  # of 2, 3, 6
    assert example_indices(analysis, 9, ["class2", "0.wav"]) == [0, 4, 5]
    assert example_indices(analysis, 2, ["class1", "class2"]) == [2, 4]
    with pytest.raises(UserError, match="--match dog cat: no path of a clip in toy contains this"):
        example_indices(analysis, 2, ["dog", "cat"])


def test_batches_contain_the_models_input(analysis_run):
    run = analysis_run("ast")
    batches = list(iterate_clips(run.analysis(), "clips"))
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    torch.testing.assert_close(torch.cat([batch.fbank for batch in batches]), torch.stack(run.fbanks()))
    frames = [1 + (len(load_audio(path)) - 400) // 160 for path in run.paths]  # 25 ms every 10 ms
    assert torch.cat([batch.sounding for batch in batches]).tolist() == frames and max(frames) < 128
    labels = [LABELS[number] for number in torch.cat([batch.targets for batch in batches]).argmax(1).tolist()]
    assert labels == [path.parent.name for path in run.paths]
    (limited,) = iterate_clips(run.analysis(limit=2), "clips")
    assert limited.index.tolist() == [0, 3]


def test_unreadable_clips_are_omitted_and_counted(analysis_run, analysis_clips, tmp_path):
    run, data = analysis_run("ast"), tmp_path / "clips"
    shutil.copytree(analysis_clips, data)
    (data / "test" / "buzz" / "broken.wav").write_text("no sound")
    run.data = data
    analysis = run.analysis()
    assert describe_data(analysis) == "folder, test, 8 clips"
    assert sum(len(batch.index) for batch in iterate_clips(analysis, "clips")) == 7
    ((path, reason),) = analysis.failed
    assert path.endswith("broken.wav") and reason
    assert describe_data(analysis) == "folder, test, 7 clips"
    for clip in run.paths:
        clip.write_text("no sound")
    with pytest.raises(UserError, match=r"no clip of folder could be read; the first is .*wav: "):
        list(iterate_clips(run.analysis(), "clips"))


def test_a_model_without_features_is_rejected(analysis_run):
    analysis = analysis_run("ast").analysis()
    analysis.model.features = None
    with pytest.raises(UserError, match="ast_tiny: the features of its input are unknown"):
        next(iterate_clips(analysis, "clips"))
