import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch

from pruneattn.data import Clip, ClipDataset, load_audio, make_loader, notices
from pruneattn.labelling.corpus import decode_clips


@pytest.fixture(autouse=True)
def report_again():
    notices.forget()
    yield
    notices.forget()


def tone(hertz=440.0):
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(16_000) / 16_000)).astype(np.float32)


def write(path, samples, **options):
    soundfile.write(path, samples, 16_000, **options)
    return path


def said(path):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load_audio(path)
    return [str(warning.message) for warning in found]


def test_float_samples_at_the_scale_of_integers(tmp_path):
    for number, (subtype, scale) in enumerate([("FLOAT", 32768), ("DOUBLE", 2.0**31), ("FLOAT", 300)]):
        notices.forget()
        path = write(tmp_path / f"{number}.wav", tone().astype(np.float64) * scale, subtype=subtype)
        (message,) = said(path)
        assert message.startswith(f"{path}: its float samples reach {0.4 * scale:.4g}, but full scale is 1")
    assert said(write(tmp_path / "again.wav", tone() * 32768, subtype="FLOAT")) == []


@pytest.mark.parametrize("scale", [1, 3, 20])
def test_a_loud_mix_is_no_integer_scale(tmp_path, scale):
    assert said(write(tmp_path / "a.wav", tone() * scale, subtype="FLOAT")) == []


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_channels_in_opposite_phase(tmp_path, name):
    left = tone()
    path = write(tmp_path / name, np.stack([left, -left], 1))
    (message,) = said(path)
    assert message.startswith(f"{path}: its channels are in opposite phase") and said(path) == []


def test_other_channels_are_no_opposite_phase(tmp_path):
    left, right = tone(), tone(700)
    for number, channels in enumerate(
        [(left, right), (left, left), (left, 0 * left), (0 * left, 0 * left), (left, -right)]
    ):
        assert said(write(tmp_path / f"{number}.wav", np.stack(channels, 1))) == []


SAY = """
import sys
from pruneattn.labelling.corpus import decode_clips

if __name__ == "__main__":
    for clip in decode_clips(sys.argv[1:], 2, ahead=4):
        assert clip.error is None
"""


@pytest.mark.slow
def test_processes_that_decode_say_it_once(tmp_path):
    paths = [str(write(tmp_path / f"{number}.wav", tone() * 32768, subtype="FLOAT")) for number in range(12)]
    printed = subprocess.run([sys.executable, "-c", SAY, *paths], capture_output=True, text=True, check=True)
    assert printed.stderr.count("but full scale is 1") in (1, 2)  # two processes can meet their first clip at once
    dataset = ClipDataset("some", [Clip(path, (0,)) for path in paths], "a", multilabel=False)
    with pytest.warns(UserWarning, match="but full scale is 1"):
        list(decode_clips(paths, 0, ahead=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(2):
            for batch in make_loader(dataset, 4, train=True, epoch=epoch, workers=2):
                assert not batch.failed and torch.isfinite(batch.waves).all()
