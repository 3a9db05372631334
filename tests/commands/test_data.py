"""``pruneattn data``: the options of the statistics. tests/data tests the functions."""

import numpy as np
import pytest
import soundfile

from pruneattn.data.__main__ import main
from pruneattn.errors import UserError


@pytest.fixture
def sounds(tmp_path):
    """Two clips to train on and one, louder, to test on."""
    for name, loudness in (("train/a/1.wav", 0.1), ("train/b/2.wav", 0.1), ("test/a/3.wav", 0.9)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        wave = loudness * np.random.default_rng(0).uniform(-1, 1, 16000)
        soundfile.write(tmp_path / name, wave, 16000)
    return tmp_path


def stats(capsys, folder, *words):
    assert main(["stats", "--dataset", "folder", "--data-dir", str(folder), *words]) == 0
    return capsys.readouterr().out


def test_the_statistics_are_those_of_the_training_clips(sounds, capsys):
    train = stats(capsys, sounds)
    assert train.startswith("folder train, 2 clips: mean ")
    assert stats(capsys, sounds, "--split", "train") == train
    assert stats(capsys, sounds, "--split", "test").startswith("folder test, 1 clips: mean ")


def test_frames_limit_each_clip(sounds, capsys):
    assert stats(capsys, sounds, "--frames", "16") != stats(capsys, sounds)


def test_an_unknown_dataset_is_an_error(capsys):
    with pytest.raises(UserError, match="'nope'.* as20k, spc2"):
        main(["stats", "--dataset", "nope"])
