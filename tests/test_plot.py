import math

import numpy as np
import pytest
import torch

from pruneattn.errors import UserError
from pruneattn.plot import (
    BLANK,
    check_plot_path,
    keep_rate_text,
    log_mel_colors,
    mel_bin,
    plot_kept_patches,
    plot_tradeoff,
    save_figure,
)

pytest.importorskip("matplotlib")


NOISE = np.random.default_rng(0).random((512, 128))


def stages():
    grid = np.zeros((8, 8), dtype=bool)
    grid[:, :4] = True
    last = np.zeros((8, 8), dtype=bool)
    last[0, 2] = last[7, 3] = True
    return [("after block 4", grid), ("after block 7", last)]


def loud_corner():
    fbank = np.full((128, 128), -10.0)
    fbank[32:48, 0:16] = 5.0  # third column in time, lowest row in mel
    return fbank


def panel_pixels(figure, number):
    image = figure.axes[number].images[0].get_array()
    return np.asarray(image)[::1]  # [mel bin, frame, RGB], lowest bin first


def test_kept_and_dropped_patches_are_drawn_at_their_positions():
    figure = plot_kept_patches(loud_corner(), stages(), title="a clip", subtitle="below", sounding=100)
    assert len(figure.axes) == 3
    whole, _, last = (panel_pixels(figure, i) for i in range(3))
    assert all(axis.images[0].origin == "lower" for axis in figure.axes)
    assert np.array_equal(last[0:16, 32:48], whole[0:16, 32:48])  # kept: as in the input
    assert np.array_equal(last[112:, 48:64], whole[112:, 48:64])
    dropped = np.ones((128, 128), dtype=bool)
    dropped[0:16, 32:48] = dropped[112:, 48:64] = False
    assert np.ptp(last[dropped], axis=0).max() == 0 and last[dropped].min() > 0.9  # the same light gray everywhere else
    assert whole[5, 40].sum() > whole[5, 60].sum() + 1  # loud is bright
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["input: 64 patches", "after block 4: 32 of 64 (50 %)", "after block 7: 2 of 64 (3 %)"]
    assert [text.get_text() for text in figure.texts] == ["a clip", "below"]


GRIDS = [(61, (10, 10)), (52, (10, 16)), (40, (16, 3)), (37, (16, 16)), (48, (16, 16))]


def covered_by_definition(grid, frames, stride):
    """Whether a chosen patch covers the cell, cell by cell: bool ``[128, frames]``."""
    corners = [(stride[0] * row, stride[1] * column) for row, column in np.argwhere(grid)]
    return np.array(
        [
            [any(m <= mel < m + 16 and t <= frame < t + 16 for m, t in corners) for frame in range(frames)]
            for mel in range(128)
        ]
    )


@pytest.mark.parametrize("frames, stride", GRIDS)
def test_the_cells_of_kept_patches_are_shown(frames, stride):
    """Also where patches overlap, and where the last patch ends before the last frame or mel bin."""
    rng = np.random.default_rng(0)
    shape = len(range(0, 113, stride[0])), len(range(0, frames - 15, stride[1]))
    grid = rng.random(shape) < 0.15
    fbank = rng.random((frames, 128))
    figure = plot_kept_patches(fbank, [("after block 4", grid)], title="", stride=stride)
    colors = log_mel_colors(fbank, frames)
    for number, chosen in enumerate((np.ones(shape, dtype=bool), grid)):
        expected = np.where(covered_by_definition(chosen, frames, stride)[..., None], colors, BLANK)
        assert np.array_equal(panel_pixels(figure, number), expected)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == [
        f"input: {grid.size} patches",
        f"after block 4: {grid.sum()} of {grid.size} ({100 * grid.mean():.0f} %)",
    ]
    whole = stride == (16, 16) and frames == 48
    assert figure.get_supxlabel() == ("" if whole else "shown: cells that at least one kept patch covers")
    assert all(axis.get_xlim() == pytest.approx((0, frames / 100)) for axis in figure.axes)


@pytest.mark.parametrize("frames, stride", GRIDS)
def test_borders_are_drawn_along_axes_without_overlap(frames, stride):
    rows, columns = len(range(0, 113, stride[0])), len(range(0, frames - 15, stride[1]))
    grid = np.zeros((rows, columns), dtype=bool)
    figure = plot_kept_patches(np.eye(frames, 128), [("after block 4", grid)], title="", start=2.0, stride=stride)
    lines = [segment for part in figure.axes[1].collections for segment in part.get_segments()]
    end, top = 2.0 + (stride[1] * (columns - 1) + 16) / 100, stride[0] * (rows - 1) + 16
    vertical = [(2.0 + frame / 100, 0, top) for frame in range(16, frames, 16)] if stride[1] == 16 else []
    horizontal = [(mel, 2.0, end) for mel in range(16, 128, 16)] if stride[0] == 16 else []
    assert [(a[0], a[1], b[1]) for a, b in lines[: len(vertical)]] == [pytest.approx(line) for line in vertical]
    assert [(a[1], a[0], b[0]) for a, b in lines[len(vertical) :]] == [pytest.approx(line) for line in horizontal]
    assert not figure.axes[0].collections


def test_axes_are_seconds_and_hertz():
    figure = plot_kept_patches(NOISE, [], title="", start=7.0, sounding=300)
    (axis,) = figure.axes
    assert axis.get_xlim() == pytest.approx((7.0, 12.12))
    ticks = dict(zip((label.get_text() for label in axis.get_yticklabels()), axis.get_yticks(), strict=True))
    assert list(ticks) == ["125", "500", "1k", "2k", "4k", "8k"]
    assert ticks["1k"] == pytest.approx(mel_bin(1000)) and ticks["8k"] == 128
    hatched = [patch for patch in axis.patches if patch.get_hatch()]
    assert len(hatched) == 1 and hatched[0].get_x() == pytest.approx(10.0)  # where the sound ends
    assert [text.get_text() for text in axis.texts] == ["padding"]
    pruned = np.ones((8, 32), dtype=bool)
    pruned[:, 20:-1] = False  # a column of the padding is kept: no word may hide it
    two = plot_kept_patches(NOISE, [("after block 4", pruned)], title="", sounding=300)
    assert [len(axis.texts) for axis in two.axes] == [1, 0]
    assert all([patch.get_hatch() for patch in axis.patches] == ["////"] for axis in two.axes)
    full = plot_kept_patches(NOISE, [], title="")
    assert not full.axes[0].patches and not full.axes[0].texts


@pytest.mark.parametrize("hertz", [250, 440, 1000, 3000, 7000])
def test_mel_axis_agrees_with_the_filterbank(hertz):
    fbank = pytest.importorskip("pruneattn.data.fbank")
    wave = torch.sin(2 * math.pi * hertz * torch.arange(16000) / 16000)[None]
    log_mel, _ = fbank.kaldi_fbank(wave, torch.tensor([16000]))
    loudest = float(log_mel[0].mean(0).argmax()) + 0.5  # center of the bin
    assert abs(mel_bin(hertz) - loudest) <= 1.0


def test_the_suffix_chooses_the_format_of_a_picture(tmp_path):
    figure = plot_kept_patches(loud_corner(), stages(), title="a")
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    save_figure(figure, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match="must end in .png, .svg or .pdf"):
        check_plot_path("a.jpeg")


def test_tradeoff():
    rows = [
        {"keep_rate": 0.5, "metric": 0.90, "gmacs_paper": 5.0, "clips_per_second": 160.0, "theory": 0.5},
        {"keep_rate": 1.0, "metric": 0.95, "gmacs_paper": 10.0, "clips_per_second": 90.0, "theory": 0.0},
    ]
    work, speed = plot_tradeoff(rows, "top-1", "title", dense_clips_per_second=100.0).axes
    assert work.lines[0].get_xydata().tolist() == [[10, 95], [5, 90]]
    promised, measured = (line.get_xydata().tolist() for line in speed.lines)
    assert promised == [[100, 95], [200, 90]] and measured == [[90, 95], [160, 90]]
    assert [text.get_text() for text in work.texts] == ["1", "0.5"]
    assert len(plot_tradeoff(rows, "top-1", "title").axes) == 1


def test_tradeoff_of_keep_rates_that_differ_by_block():
    rows = [
        {
            "keep_rate": rate,
            "metric": 0.9 + number / 100,
            "gmacs_paper": gmacs,
            "clips_per_second": 10 * gmacs,
            "theory": 0,
        }
        for number, (rate, gmacs) in enumerate([((0.9, 0.7), 8.0), (1.0, 10.0), ([0.6, 0.5], 5.0), (0.5, 4.0)])
    ]
    work, speed = plot_tradeoff(rows, "top-1", "title", dense_clips_per_second=100.0).axes
    line, single = (drawn.get_xydata().tolist() for drawn in work.lines)
    assert line == [[10, pytest.approx(91)], [4, pytest.approx(93)]]
    assert single == [[8, pytest.approx(90)], [5, pytest.approx(92)]] and work.lines[1].get_linestyle() == "None"
    assert [text.get_text() for text in work.texts] == ["1", "0.9,0.7", "0.6,0.5", "0.5"]
    assert len(speed.lines) == 4 and [text.get_text() for text in speed.get_legend().get_texts()][1] == "measured"


@pytest.mark.parametrize(
    ("keep_rate", "text"),
    [(0.7, "0.7"), (1, "1"), ((0.9, 0.7, 0.9), "0.9,0.7,0.9"), ([0.5, 0.5], "0.5"), ((1.0,), "1")],
)
def test_keep_rates_as_text(keep_rate, text):
    assert keep_rate_text(keep_rate) == text
    assert keep_rate_text(keep_rate, "-") == text.replace(",", "-")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        check_plot_path("a.png")
