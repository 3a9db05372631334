import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

import pruneattn
from pruneattn.data import FeatureConfig
from pruneattn.errors import UserError
from pruneattn.labelling import corpus, long_clips
from pruneattn.labelling.corpus import decode, decode_clips
from pruneattn.labelling.long_clips import LongClip, stream_windows
from pruneattn.labelling.windows import Labeler, window_starts


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("samples", [401, 500, 1000, 1001, 2500, 2503])
@pytest.mark.parametrize("block", [1, 99, 100, 101, 250, 5000])
def test_windows_of_a_stream_are_those_of_the_whole_clip(overlap, samples, block):
    wave, window = torch.arange(float(samples)), 100

    def starts(samples):
        return window_starts(samples, window, overlap)

    found = list(stream_windows(wave.split(block), window, starts))
    assert [start for start, _, _ in found] == starts(samples) and found[-1][2] == samples
    for start, piece, _ in found:
        assert torch.equal(piece, wave[start : start + window])


@pytest.fixture
def labeler():
    torch.manual_seed(0)
    model = pruneattn.create_model(
        "audiomae_tiny", num_classes=4, frames=128, embed_dim=48, depth=2, num_heads=3, prune_blocks=(0,), keep_rate=0.5
    )
    torch.nn.init.normal_(model.head.weight, std=1.0)
    model.features, model.labels, model.multilabel = FeatureConfig(frames=128, mean=-11.0, std=3.0), list("abcd"), False
    return Labeler(model.eval(), "cpu", windows=True, batch_size=4)


def write(path, seconds, rate=22_050):
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * rate)), rate)
    return str(path)


def test_a_long_clip_has_the_labels_of_the_whole_clip(tmp_path, monkeypatch, labeler):
    paths = [write(tmp_path / f"{number}.wav", seconds) for number, seconds in enumerate((2, 9.3, 3, 30.01, 1))]
    expected = [labeler.row(clip) for clip in labeler.clips(decode_clips(paths, 0, ahead=3))]
    monkeypatch.setattr(corpus, "LONGEST_SECONDS", 5.0)
    decoded = list(decode_clips(paths, 0, ahead=3))
    assert [isinstance(clip.wave, LongClip) for clip in decoded] == [False, True, False, True, False]
    assert isinstance(decode(paths[1], whole=True).wave, np.ndarray)
    clips = list(labeler.clips(decoded))
    for clip, row, whole in zip(clips, map(labeler.row, clips), expected, strict=True):
        for found, wanted in zip([row, *row.pop("windows")], [whole, *whole.pop("windows")], strict=True):
            assert found.pop("scores") == pytest.approx(wanted.pop("scores"), abs=1e-5)
            assert found == wanted
        start = clip.starts[-1]
        torch.testing.assert_close(
            clip.part(start, 9), torch.from_numpy(decode(clip.path, whole=True).wave)[start:][:9]
        )


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_long_clip_that_ends_early_is_a_failure(tmp_path, monkeypatch, labeler, apart):
    paths = [write(tmp_path / f"{number}.wav", 9) for number in range(3)]
    os.truncate(paths[1], 300_000)
    decoded = [corpus.Decoded(path, LongClip(path, apart=apart), None) for path in paths]
    rows = [labeler.row(clip) for clip in labeler.clips(decoded)]
    assert ["error" in row for row in rows] == [False, True, False]
    assert rows[1]["error"].startswith(f"{paths[1]}: the file is truncated") and rows[0]["labels"] == rows[2]["labels"]


def test_a_long_clip_whose_process_is_killed_is_a_failure(tmp_path):
    blocks = iter(LongClip(write(tmp_path / "a.wav", 200), apart=True))
    next(blocks)
    (child,) = long_clips.multiprocessing.active_children()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a\.wav: its decoding process crashed or was killed"):
        list(blocks)
    assert not long_clips.multiprocessing.active_children()


def test_a_reader_that_stops_ends_the_decoding_process(tmp_path):
    clip = LongClip(write(tmp_path / "a.wav", 200), apart=True)
    assert torch.equal(clip.part(10, 20), LongClip(clip.path, apart=False).part(10, 20))
    assert not long_clips.multiprocessing.active_children()


MEASURED = """
import resource, sys, torch
from pruneattn.labelling.corpus import decode_clips
from pruneattn.labelling.long_clips import stream_windows

def run(paths):
    for clip in decode_clips(paths, int(sys.argv[1]), ahead=4):
        assert clip.error is None, clip.error
        for _ in stream_windows(clip.wave, 160_000, lambda samples: [*range(0, samples - 160_000, 80_000)]):
            pass

def peak():
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

run(sys.argv[2:3])
before = peak()
run(sys.argv[3:4])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss, sparse files")
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_does_not_depend_on_the_length_of_a_clip(tmp_path, workers):
    paths = [str(tmp_path / name) for name in ("short.wav", "long.wav")]
    for path, hours in zip(paths, (0.2, 4)):
        soundfile.write(path, np.zeros(1000), 8000, subtype="PCM_U8")
        samples = int(hours * 3600 * 8000)
        with open(path, "r+b") as file:
            head = bytearray(file.read(44))
            head[4:8], head[40:44] = (36 + samples).to_bytes(4, "little"), samples.to_bytes(4, "little")
            file.seek(0)
            file.write(head)
            file.truncate(44 + samples)
    command = [sys.executable, "-c", MEASURED, str(workers), *paths]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(printed.stdout) < 30_000, "KiB; the whole clip is 920 MB"
