import numpy as np
import pytest
import soundfile
import torch

from pruneattn.data import Clip, ClipDataset


def write(path, samples, rate=16000):
    soundfile.write(path, np.asarray(samples, dtype=np.float32), rate, subtype="FLOAT")
    return path


@pytest.fixture
def waves():
    rng = np.random.default_rng(0)
    return [rng.uniform(-0.5, 0.5, size).astype(np.float32) for size in (16000, 8000, 1000)]


@pytest.fixture
def clips(tmp_path, waves):
    good = [write(tmp_path / f"{i}.wav", wave) for i, wave in enumerate(waves)]
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not a sound file")
    (tmp_path / "cut.wav").write_bytes(good[0].read_bytes()[:9000])
    write(tmp_path / "short.wav", np.zeros(160))
    write(tmp_path / "nan.wav", np.full(16000, np.nan))
    bad = [tmp_path / f"{name}.wav" for name in ("empty", "text", "cut", "short", "nan", "absent")]
    paths = [good[0], bad[0], good[1], *bad[1:], good[2]]
    return [Clip(path, (i % 3,)) for i, path in enumerate(paths)]


@pytest.mark.parametrize("cache", [False, True])
def test_items(clips, waves, cache):
    dataset = ClipDataset("some", clips, ["a", "b", "c"], multilabel=False, cache=cache)
    assert (dataset.name, dataset.labels, dataset.num_classes, len(dataset)) == ("some", ["a", "b", "c"], 3, 9)
    for i, wave in {0: waves[0], 2: waves[1], 8: waves[2]}.items():
        item = dataset[i]
        assert item["index"] == i and item["error"] is None
        assert item["wave"].dtype == torch.float32
        np.testing.assert_array_equal(item["wave"], wave)
        assert item["target"].tolist() == [float(k == i % 3) for k in range(3)]
    for i in (1, 3, 4, 5, 6, 7):
        item = dataset[i]
        assert item["wave"] is None and str(clips[i].path) in item["error"]


def test_cache_reads_each_file_once(clips, waves):
    dataset = ClipDataset("some", clips, ["a", "b", "c"], multilabel=False, cache=True)
    for clip in clips:
        clip.path.unlink(missing_ok=True)
    np.testing.assert_array_equal(dataset[8]["wave"], waves[2])
    assert "NaN" in dataset[6]["error"]


@pytest.mark.parametrize("cache", [False, True])
def test_long_clips_are_cut(clips, waves, cache):
    dataset = ClipDataset("some", clips, ["a", "b", "c"], multilabel=False, max_samples=5001, cache=cache)
    np.testing.assert_array_equal(dataset[0]["wave"], waves[0][:5001])
    np.testing.assert_array_equal(dataset[8]["wave"], waves[2])


def test_several_labels(clips):
    dataset = ClipDataset("some", [Clip(clips[0].path, (0, 2))], ["a", "b", "c"], multilabel=True, missing=["x"])
    assert dataset[0]["target"].tolist() == [1.0, 0.0, 1.0]
    assert dataset.multilabel and dataset.missing == ["x"]
