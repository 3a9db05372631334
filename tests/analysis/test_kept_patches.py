import csv
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pruneattn
from pruneattn.analysis.kept_patches import Example, example_rows, find_pauses, patch_kinds, plot_page
from pruneattn.errors import UserError
from pruneattn.models import create_model


def level(decibel):
    """Log-mel of a frame with this energy in dB, the same in all 128 bins."""
    return decibel / 10 * np.log(10)


def test_pauses_are_long_and_quiet():
    """At least ten frames 30 dB below the loud frames; mean 0 and std 1/2 do not change the log-mel."""
    fbank = torch.full((2, 128, 128), level(-20.0))
    fbank[0, 20:40] = level(-50.5)  # a pause
    fbank[0, 50:59] = level(-60.0)  # nine frames: too short
    fbank[0, 60:90] = level(-49.5)  # not quiet enough
    fbank[0, 100:] = level(-90.0)  # padding
    fbank[1, 0:10] = level(-51.0)
    fbank[1, 118:] = level(-51.0)  # ten frames each, at both ends
    found = find_pauses(fbank, torch.tensor([100, 128]), std=0.5)
    assert found[0].nonzero().flatten().tolist() == list(range(20, 40))
    assert found[1].nonzero().flatten().tolist() == [*range(10), *range(118, 128)]
    # The same pauses with another normalization and another loudness.
    torch.testing.assert_close(find_pauses((fbank + 3) / 8, torch.tensor([100, 128]), std=4.0), found)


def test_these_clips_have_no_pauses():
    fbank = torch.full((4, 64, 128), -1.3)  # constant silence: no frame is quieter than other frames
    fbank[1, 3:] = -1.0
    fbank[1, 3] = 5.0  # a click of one frame does not make the other frames quiet
    fbank[2, :9] = 5.0  # less than 0.1 s of sound, with padding after it
    found = find_pauses(fbank, torch.tensor([64, 64, 9, 0]), std=2.0)  # the last clip is only padding
    assert found.shape == (4, 64) and not found.any()


@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_most_frames_decide_the_kind_of_a_patch(family):
    model = create_model(f"{family}_tiny", embed_dim=24, depth=1, num_heads=1, prune_blocks=(0,), frames=64)
    pauses = torch.zeros(1, 64, dtype=torch.bool)
    pauses[0, 9:24] = True  # 7 frames of the first column, 8 of the second
    kinds = patch_kinds(model, pauses, torch.tensor([41]))[0]  # the third column has 9 frames of sound, 7 of padding
    time, _ = model.patch_position(torch.arange(32))
    assert [set(kinds[time == column].tolist()) for column in range(4)] == [{0}, {1}, {0}, {2}]


@pytest.mark.parametrize("frames, stride", [(121, (10, 10)), (100, (10, 16)), (100, 16), (47, (3, 7))])
def test_the_kind_of_a_patch_at_any_stride_is_that_of_its_own_frames(frames, stride):
    options = dict(embed_dim=24, depth=1, num_heads=1, prune_blocks=(0,), frames=frames, stride=stride)
    model = create_model("ast_tiny", **options)
    pauses = torch.rand(3, frames, generator=torch.Generator().manual_seed(0)).lt(0.5)
    sounding = torch.tensor([frames, frames - 9, 11])
    pauses &= torch.arange(frames) < sounding[:, None]
    found = patch_kinds(model, pauses, sounding)
    assert found.shape == (3, model.num_patches)
    columns = range(0, frames - 15, model.stride[1])
    for clip in range(3):
        expected = []
        for start in columns:
            padding = sum(frame >= sounding[clip] for frame in range(start, start + 16))
            pause = sum(bool(pauses[clip, frame]) for frame in range(start, start + 16))
            expected.append(2 if padding >= 8 else 1 if pause >= 8 else 0)
        assert found[clip].tolist() == expected * len(range(0, 113, model.stride[0]))  # mel row by mel row
    assert {0, 1, 2} == set(found.flatten().tolist())


def test_the_page_shows_the_cells_of_overlapping_patches():
    pytest.importorskip("matplotlib")
    options = dict(embed_dim=24, depth=1, num_heads=1, prune_blocks=(0,), frames=61, stride=(10, 7))
    model = create_model("ast_tiny", **options)
    places = [(0, 11), (1, 11), (5, 0), (6, 4)]  # time column of 7, mel row of 12
    grid = model.kept_grid(torch.tensor([7 * mel + time for time, mel in places]))
    clip = SimpleNamespace(path=SimpleNamespace(stem="x"), labels=(1,))
    dataset = SimpleNamespace(clips=[clip], labels=["dog", "cat"])
    pauses = torch.zeros(61, dtype=torch.bool)
    fbank = torch.randn(61, 128, generator=torch.Generator().manual_seed(0))
    examples = [Example(0, fbank, 61, pauses, [grid], predicted=1)]
    figure = plot_page(model, dataset, examples, "t")
    whole, last = (np.asarray(axis.images[0].get_array()) for axis in figure.axes)
    shown, input_shown = ((image != whole[127, 60]).any(-1) for image in (last, whole))  # this cell has no patch
    expected = np.zeros((128, 61), dtype=bool)
    for time, mel in places:
        expected[10 * mel : 10 * mel + 16, 7 * time : 7 * time + 16] = True
    assert np.array_equal(shown, expected) and np.array_equal(last[expected], whole[expected])
    assert input_shown[:126, :58].all() and not input_shown[126:].any() and not input_shown[:, 58:].any()
    assert figure.axes[1].get_title("left") == "after block 1: 4 of 84"
    assert figure.get_supxlabel().endswith("; shown: cells that at least one kept patch covers")
    rows = example_rows(model, dataset, examples)
    assert [row["patches"] for row in rows] == [84, 4] and rows[1]["sound"] == 1


@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_patches_are_drawn_at_their_positions(family):
    """Patches are drawn at their positions in the spectrogram, with the token order of either family."""
    collections = pytest.importorskip("matplotlib.collections")
    model = create_model(f"{family}_tiny", embed_dim=24, depth=2, num_heads=1, prune_blocks=(0, 1), frames=64)
    places = [(0, 7), (2, 0), (3, 3)]  # time column, mel row
    order = {"audiomae": lambda time, mel: 8 * time + mel, "ast": lambda time, mel: 4 * mel + time}[family]
    grid = model.kept_grid(torch.tensor(sorted(order(*place) for place in places)))
    assert {(int(time), int(mel)) for mel, time in grid.nonzero()} == set(places)
    fbank = torch.randn(64, 128)
    clip = SimpleNamespace(path=SimpleNamespace(stem="x"), labels=(1,))
    dataset = SimpleNamespace(clips=[clip], labels=["dog", "cat"])
    pauses = torch.zeros(64, dtype=torch.bool)
    pauses[10:30] = True
    example = Example(0, fbank, 48, pauses, [torch.ones(8, 4, dtype=torch.bool), grid], predicted=0)
    figure = plot_page(model, dataset, [example], "t")
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [["padding"], ["padding"], []]
    whole, _, last = (np.asarray(axis.images[0].get_array()) for axis in figure.axes)
    shown = (last == whole).all(-1)  # [mel bin, frame], lowest bin first
    expected = np.zeros((128, 64), dtype=bool)
    for time, mel in places:
        expected[16 * mel : 16 * mel + 16, 16 * time : 16 * time + 16] = True
    assert np.array_equal(shown, expected)
    assert figure.axes[0].get_title("left") == "cat (predicted: dog)"
    assert figure.axes[2].get_title("left") == "after block 2: 3 of 32"
    for axis in figure.axes:
        (bars,) = [item for item in axis.collections if isinstance(item, collections.PolyCollection)]
        corners = np.concatenate([path.vertices for path in bars.get_paths()])
        assert corners[:, 0].min() == pytest.approx(0.1) and corners[:, 0].max() == pytest.approx(0.3)
        assert corners[:, 1].max() < 0  # below the spectrogram
    assert [line.get_xdata()[0] for line in figure.axes[0].lines].count(0.48) == 1  # padding begins
    clip.path = "x.wav"
    rows = example_rows(model, dataset, [example])
    assert [row["patches"] for row in rows] == [32, 32, 3]
    assert rows[0] == {"clip": "x.wav", "stage": "input", "patches": 32, "sound": 0.5, "pause": 0.25, "padding": 0.25}
    assert (rows[2]["sound"], rows[2]["pause"], rows[2]["padding"]) == pytest.approx((2 / 3, 0, 1 / 3))


@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_the_command_counts_kept_patches(analysis_run, analyze, tmp_path, family):
    run = analysis_run(family)
    command = [*run.options(tmp_path / "out"), "--keep-rate", "0.5", "--clips", "2", "--match", "siren", "tone"]
    analyze("kept_patches", *command)
    run.model.set_keep_rate(0.5)
    columns = []  # computed directly: seconds of the patches that the last stage keeps, clip by clip
    for fbank in run.fbanks():
        kept = pruneattn.trace(run.model, fbank[None]).kept[-1][0]
        columns.append(kept // 8 if family == "audiomae" else kept % 8)
    shares = []
    for column, path in zip(columns, run.paths):
        frames = 1 + (len(pruneattn.data.load_audio(path)) - 400) // 160
        padding = torch.stack([(torch.arange(16) + 16 * c >= frames).float().mean() >= 0.5 for c in column])
        shares.append(padding.double().mean())
    shares = torch.stack(shares)
    with open(tmp_path / "out" / "kept_shares.csv", newline="") as file:
        rows = {(row["stage"], row["kind"]): row for row in csv.DictReader(file)}
    assert len(rows) == 4 * 3 and int(rows["after block 3", "sound"]["patches"]) == 8
    row = rows["after block 3", "padding"]
    assert float(row["share"]) == pytest.approx(shares.mean().item()) and int(row["clips"]) == 7
    assert float(row["se"]) == pytest.approx((shares.std() / 7**0.5).item(), abs=1e-9)
    for stage in ("input", "after block 1"):
        assert sum(float(rows[stage, kind]["share"]) for kind in ("sound", "pause", "padding")) == pytest.approx(1)
    with open(tmp_path / "out" / "kept_patches.csv", newline="") as file:
        shown = [row["clip"] for row in csv.DictReader(file)]
    assert len(shown) == 2 * 4 and all("siren" in clip or "tone" in clip for clip in shown)
    assert (tmp_path / "out" / "kept_patches.png").stat().st_size > 20000
    # One clip of each class, although the first two clips have the same class.
    assert {Path(clip).parent.name for clip in shown} == {"siren", "tone"}
    for wrong, message in ((["--match", "bark"], "--match bark: no path of a clip"), (["--clips", "0"], "--clips 0")):
        with pytest.raises(UserError, match=message):
            analyze("kept_patches", *run.options(tmp_path / "out"), *wrong)


def test_another_score_ranks_the_patches(analysis_run, analyze, tmp_path):
    run = analysis_run("ast")
    command = [*run.options(tmp_path / "out"), "--keep-rate", "0.25", "--clips", "1", "--score", "intensity"]
    analyze("kept_patches", *command)
    with open(tmp_path / "out" / "kept_patches.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert last["stage"] == "after block 3" and last["patches"] == "1"
    values = [fbank.unfold(0, 16, 16).unfold(1, 16, 16).mean((2, 3)).max(1).values.argmax() for fbank in run.fbanks()]
    frames = [1 + (len(pruneattn.data.load_audio(path)) - 400) // 160 for path in run.paths]
    clip = [str(path) for path in run.paths].index(last["clip"])
    assert 16 * values[clip] + 8 < frames[clip] and float(last["sound"]) == 1  # only the loudest patch is left


def test_unreadable_clips_are_not_shown(analysis_run, analyze, tmp_path, capsys):
    run = analysis_run("audiomae")
    shutil.copytree(run.data, tmp_path / "data")
    run.data = tmp_path / "data"
    (run.data / "test" / "tone" / "broken.wav").write_bytes(b"no sound")
    command = [*run.options(tmp_path / "out"), "--clips", "9", "--match"]
    analyze("kept_patches", *command, "tone")  # three readable clips, and the broken one
    assert "1 of 8 clips could not be read" in capsys.readouterr().out
    with open(tmp_path / "out" / "kept_patches.csv", newline="") as file:
        assert len({row["clip"] for row in csv.DictReader(file)}) == 3
    with pytest.raises(UserError, match="broken.wav and the other clips to show could not be read"):
        analyze("kept_patches", *command, "broken")
