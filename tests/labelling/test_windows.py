"""Windows and pictures of models whose patches overlap or do not cover all frames."""

import numpy as np
import pytest
import torch

import pruneattn
from pruneattn.data import FeatureConfig, FeatureExtractor
from pruneattn.labelling import pictures
from pruneattn.labelling.windows import Clip, Labeler, window_starts

GRIDS = [(121, 10), (100, (10, 16)), (100, 16), (96, 16)]


def make_model(frames, stride, **options):
    torch.manual_seed(1)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "prune_blocks": (0, 1), "num_classes": 4, **options}
    model = pruneattn.create_model("ast_tiny", frames=frames, stride=stride, **sizes).eval()
    torch.nn.init.normal_(model.head.weight)
    model.features, model.labels, model.multilabel = FeatureConfig(frames, -11.0, 3.0), list("abcd"), False
    return model


def frames_with_patches(model):
    """Frames of the input that a change of the spectrogram shows to matter."""
    fbank = torch.zeros(1, model.frames, 128, requires_grad=True)
    model.embed(fbank).square().sum().backward()
    return fbank.grad.abs().sum((0, 2)).nonzero().flatten().tolist()


@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("frames, stride", GRIDS)
def test_the_patches_of_the_windows_cover_a_long_clip(frames, stride, overlap):
    model = make_model(frames, stride)
    seen = frames_with_patches(model)
    assert seen == list(range(len(seen)))
    for length in (frames + 1, 2 * frames, 250, 333):
        wave = torch.randn(400 + 160 * (length - 1))
        (clip,) = Labeler(model, "cpu", overlap=overlap).clips([("a.wav", wave, None)])
        assert clip.starts[0] == 0 and all(torch.tensor(clip.starts).diff() > 0)
        ends = [start + 160 * (len(seen) - 1) + 400 for start in clip.starts]  # of the last patch of each window
        assert ends[-1] == len(wave)
        shared = [end - following for end, following in zip(ends, clip.starts[1:])]
        assert min(shared) >= overlap * ends[0] - 1  # rounded
        for start, scores in zip(clip.starts, clip.scores, strict=True):
            with torch.no_grad():
                part = wave[start : start + 400 + 160 * (frames - 1)]
                expected = model(FeatureExtractor(model.features)(part[None]))[0].softmax(-1)
            torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("frames, stride", GRIDS)
def test_a_clip_that_fits_into_the_input_has_one_window(frames, stride):
    """As in evaluation, which reads the start of each clip."""
    wave = torch.randn(400 + 160 * (frames - 1))
    (clip,) = Labeler(make_model(frames, stride), "cpu", overlap=0.0).clips([("a.wav", wave, None)])
    assert clip.starts == [0]


def test_starts_by_the_covered_samples():
    assert window_starts(100, 100, 0.5, 90) == [0]
    assert window_starts(101, 100, 0.0, 90) == [0, 11]
    assert window_starts(270, 100, 0.0, 90) == [0, 90, 180]
    assert window_starts(271, 100, 0.5, 90) == [0, 45, 90, 135, 180, 181]


@pytest.mark.parametrize("frames, stride", [(121, 10), (100, (10, 16)), (100, 16)])
def test_the_picture_shows_the_loudest_patches_of_any_grid(frames, stride):
    """With the intensity score, the kept patches of the picture are those with the largest mean."""
    pytest.importorskip("matplotlib")
    model = make_model(frames, stride, score="intensity", keep_rate=0.25)
    wave = torch.randn(400 + 160 * (frames - 1)) * torch.linspace(0.1, 1, 400 + 160 * (frames - 1))
    figure = pictures.draw_clip(model, Clip("a.wav", wave, [0], [torch.tensor([0.1, 0.7, 0.1, 0.1])]), "cpu")
    fbank = FeatureExtractor(model.features)(wave[None])[0]
    of_frequency, of_time = model.stride
    corners = [(mel, time) for mel in range(0, 113, of_frequency) for time in range(0, frames - 15, of_time)]
    means = [float(fbank[time : time + 16, mel : mel + 16].mean()) for mel, time in corners]
    assert [axis.get_title("left").split(":")[0] for axis in figure.axes] == ["input", "after block 1", "after block 2"]
    count = int(figure.axes[2].get_title("left").split()[3])
    best = sorted(range(len(corners)), key=lambda patch: -means[patch])[:count]
    whole, last = (np.asarray(figure.axes[number].images[0].get_array()) for number in (0, 2))
    shown = np.zeros((128, frames), dtype=bool)
    for mel, time in (corners[patch] for patch in best):
        shown[mel : mel + 16, time : time + 16] = True
    assert np.array_equal(last[shown], whole[shown]) and np.ptp(last[~shown], axis=0).max() == 0
    assert (last[shown] != last[~shown][0]).any(-1).all()
