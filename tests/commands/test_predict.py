import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

import pruneattn
from pruneattn import plot, predict
from pruneattn.data import FeatureConfig, FeatureExtractor, load_audio
from pruneattn.data.fbank import samples_for
from pruneattn.data.toy import make_sound
from pruneattn.errors import UserError
from pruneattn.labelling import pictures, windows

pytestmark = pytest.mark.device  # commands and models use the GPU if there is one

LABELS = ["buzz", "siren", "tone", "noise"]
FEATURES = FeatureConfig(frames=128, mean=-11.0, std=3.0)
WINDOW = samples_for(128)


def make_model(name="audiomae_tiny", **options):
    torch.manual_seed(1)
    options = {"frames": 128, "embed_dim": 48, "depth": 4, "num_heads": 3, "prune_blocks": (0, 1, 2), **options}
    model = pruneattn.create_model(name, num_classes=4, **options)
    torch.nn.init.normal_(model.head.weight, std=1.0)
    return model.eval()


def save(folder, model, multilabel=False, features=FEATURES):
    path = folder / "best.safetensors"
    pruneattn.save_pretrained(model, path, features=features, labels=LABELS, multilabel=multilabel)
    return path


def logits_of(model, wave):
    with torch.no_grad():
        return model(FeatureExtractor(FEATURES)(wave[None]))[0]


@pytest.fixture
def checkpoint(tmp_path):
    return save(tmp_path, make_model(keep_rate=0.5))


@pytest.fixture
def clip(tmp_path):
    soundfile.write(tmp_path / "clip.wav", make_sound("siren", np.random.default_rng(0)), 16000)
    return tmp_path / "clip.wav"


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of the drawing function."""
    pytest.importorskip("matplotlib")
    seen = {}
    monkeypatch.setattr(
        pictures, "plot_kept_patches", lambda fbank, kept, **rest: seen.update(rest, fbank=fbank, kept=kept)
    )
    return seen


def run(capsys, *arguments):
    """Exit code and rows of a run that writes its rows to standard output."""
    capsys.readouterr()
    code = predict.main([*map(str, arguments), "--output", "-"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_labels_with_scores(checkpoint, clip, capsys):
    code, (row,) = run(capsys, checkpoint, clip, "--top-k", 3)
    expected = logits_of(make_model(keep_rate=0.5), load_audio(clip)).softmax(-1)
    best = expected.argsort(descending=True)[:3].tolist()
    assert code == 0 and set(row) == {"path", "seconds", "labels", "scores"} and row["path"] == str(clip)
    assert row["labels"] == [LABELS[i] for i in best]
    assert row["scores"] == pytest.approx(expected[best].tolist(), abs=1e-5)  # a GPU sums in another order
    assert row["seconds"] == pytest.approx(len(load_audio(clip)) / 16000)

    _, (row,) = run(capsys, "--keep-rate", 1.0, checkpoint, clip, "--windows")
    dense = logits_of(make_model(), load_audio(clip)).softmax(-1)
    assert row["scores"][0] == pytest.approx(float(dense.max()), abs=1e-6)
    assert abs(float(dense.max()) - float(expected.max())) > 1e-4, (
        "the keep-rates give equal results, so this test checks nothing"
    )
    assert row["windows"] == [{"start": 0, "end": row["seconds"], "labels": row["labels"], "scores": row["scores"]}]


def test_the_labels_as_text(checkpoint, clip, capsys):
    assert predict.main([str(checkpoint), str(clip), "--top-k", "2"]) == 0
    expected = logits_of(make_model(keep_rate=0.5), load_audio(clip)).softmax(-1)
    best = expected.argsort(descending=True)[:2].tolist()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"{clip} ({len(load_audio(clip)) / 16000:.2f} s)",
        *(f"  {expected[i]:.4f}  {LABELS[i]}" for i in best),
    ]
    assert printed.err == ""
    soundfile.write(clip, np.tile(make_sound("siren", np.random.default_rng(0)), 3), 16000)
    predict.main([str(checkpoint), str(clip), "--overlap", "0"])
    count = math.ceil(len(load_audio(clip)) / WINDOW)
    assert f"mean of {count} windows" in capsys.readouterr().out


def test_scores_of_a_multilabel_model_are_sigmoids(clip, tmp_path, capsys):
    checkpoint = save(tmp_path, make_model(), multilabel=True)
    _, (row,) = run(capsys, checkpoint, clip)
    expected = logits_of(make_model(), load_audio(clip)).sigmoid().sort(descending=True).values
    assert row["scores"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_window_starts():
    assert windows.window_starts(100, 100, 0.5) == [0]
    assert windows.window_starts(7, 100, 0.5) == [0]
    assert windows.window_starts(101, 100, 0.5) == [0, 1]  # the last ends with the clip
    assert windows.window_starts(200, 100, 0.5) == [0, 50, 100]
    assert windows.window_starts(220, 100, 0.5) == [0, 50, 100, 120]
    assert windows.window_starts(300, 100, 0.0) == [0, 100, 200]
    for samples in range(1, 400, 7):
        starts = windows.window_starts(samples, 90, 0.3)
        covered = {sample for start in starts for sample in range(start, start + 90)}
        assert covered >= set(range(samples)) and (starts[-1] + 90 == samples or samples <= 90)


def test_long_clips_are_averaged_over_windows(checkpoint, tmp_path, capsys):
    wave = np.concatenate([make_sound(kind, np.random.default_rng(i)) for i, kind in enumerate(LABELS)])
    soundfile.write(tmp_path / "long.flac", wave, 16000)
    wave = load_audio(tmp_path / "long.flac")
    starts = windows.window_starts(len(wave), WINDOW, 0.5)
    assert len(starts) >= 3
    model = make_model(keep_rate=0.5)
    each = torch.stack([logits_of(model, wave[start : start + WINDOW]).softmax(-1) for start in starts])
    for batch_size in (2, 16):  # windows of a clip may fall into several batches
        _, (row,) = run(
            capsys, checkpoint, tmp_path / "long.flac", "--batch-size", batch_size, "--top-k", 4, "--windows"
        )
        scores = dict(zip(row["labels"], row["scores"], strict=True))
        assert [scores[label] for label in LABELS] == pytest.approx(each.mean(0).tolist(), abs=1e-5)
        assert [one["start"] for one in row["windows"]] == [start / 16000 for start in starts]
        assert row["windows"][-1]["end"] == pytest.approx(row["seconds"])
        assert [one["scores"][0] for one in row["windows"]] == pytest.approx(each.max(1).values.tolist(), abs=1e-5)
        assert [one["labels"][0] for one in row["windows"]] == [LABELS[i] for i in each.argmax(1)]


def test_an_unreadable_clip_does_not_stop_the_run(checkpoint, clip, tmp_path, capsys):
    folder = tmp_path / "sounds" / "below"
    folder.mkdir(parents=True)
    wave = make_sound("buzz", np.random.default_rng(3))
    soundfile.write(folder / "good.wav", wave, 16000)
    soundfile.write(folder / "cut.wav", wave, 16000)
    whole = (folder / "cut.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("I am no sound")
    (folder / "notes.txt").write_text("ignored")
    soundfile.write(folder / "short.wav", wave[:160], 16000)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    (tmp_path / "none").mkdir()
    inputs = [tmp_path / "sounds", clip, tmp_path / "missing.wav", tmp_path / "none"]
    assert predict.main([str(checkpoint), *map(str, inputs), "--top-k", "1"]) == 0
    printed = capsys.readouterr()
    assert [line.split(" (")[0] for line in printed.out.splitlines()[::2]] == [str(folder / "good.wav"), str(clip)]
    assert "7 of 9 clips could not be labeled:\n" in printed.err
    for name in ("cut.wav", "empty.wav", "text.wav", "short.wav", "nan.wav", "missing.wav", "none"):
        assert printed.err.count(f"{name}:") == 1
    assert predict.main([str(checkpoint), str(folder / "text.wav")]) == 1


@pytest.mark.parametrize("words", [["0.9,0.5,0.2"], ["0.9", "0.5", "0.2"]])
def test_a_keep_rate_for_each_pruning_block(checkpoint, clip, capsys, words):
    _, (row,) = run(capsys, "--keep-rate", *words, checkpoint, clip)
    expected = logits_of(make_model(keep_rate=(0.9, 0.5, 0.2)), load_audio(clip)).softmax(-1)
    assert row["scores"][0] == pytest.approx(float(expected.max()), abs=1e-5)
    with pytest.raises(UserError, match="keep_rate: 2 values for 3 pruning blocks"):
        predict.main([str(checkpoint), str(clip), "--keep-rate", "0.9", "0.5"])


def test_a_stopped_run_is_resumed(checkpoint, tmp_path, capsys, monkeypatch):
    folder, output = tmp_path / "sounds", tmp_path / "out.jsonl"
    folder.mkdir()
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", make_sound(LABELS[number], np.random.default_rng(number)), 16000)
    command = [str(checkpoint), str(folder), "--output", str(output)]
    assert predict.main(command) == 0
    lines = output.read_text().splitlines(keepends=True)
    output.write_text(lines[0] + lines[1] + lines[2][:-9])  # as after a kill
    decoded = []
    monkeypatch.setattr(predict, "decode_clips", lambda paths, *rest, **options: decoded.extend(paths) or [])
    predict.main(command)
    assert decoded == [str(folder / "2.wav")] and output.read_text() == lines[0] + lines[1]
    monkeypatch.undo()
    assert predict.main(command) == 0
    rows = [[json.loads(line) for line in text] for text in (output.read_text().splitlines(), lines)]
    assert [row["labels"] for row in rows[0]] == [row["labels"] for row in rows[1]]
    assert [row["scores"] for row in rows[0]] == [pytest.approx(row["scores"], abs=1e-5) for row in rows[1]]


STOPPING = """
import sys, time
from pruneattn import predict

def decode_clips(*args, original=predict.decode_clips, **options):
    for clip in original(*args, **options):
        if clip.path.endswith("6.wav"):
            time.sleep(600)
        yield clip

predict.decode_clips = decode_clips
sys.exit(predict.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_run_is_resumed(workers, checkpoint, tmp_path, capsys):
    folder, output = tmp_path / "sounds", tmp_path / "out.jsonl"
    folder.mkdir()
    for number in range(9):
        wave = make_sound(LABELS[number % 4], np.random.default_rng(number))[: 4000 + 1500 * number]
        soundfile.write(folder / f"{number}.wav", wave, 16000)
    options = ["--batch-size", "2", "--workers", str(workers)]
    command = [str(checkpoint), str(folder), "--output", str(output), *options]
    _, expected = run(capsys, checkpoint, folder, *options)

    process = subprocess.Popen([sys.executable, "-c", STOPPING, *command], stderr=subprocess.PIPE)
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 6):
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=120)  # until the last process that it started has ended, too
    assert process.returncode == -signal.SIGKILL
    assert output.read_bytes().count(b"\n") == 6
    os.truncate(output, output.stat().st_size - 9)  # a kill can leave an incomplete last line

    assert predict.main(command) == 0
    rows = sorted(map(json.loads, output.read_text().splitlines()), key=lambda row: row["path"])
    assert [row["path"] for row in rows] == [row["path"] for row in expected]
    for row, whole in zip(rows, expected, strict=True):  # other clips share a batch, which changes the last bits
        assert row["labels"] == whole["labels"] and row["scores"] == pytest.approx(whole["scores"], abs=1e-5)


def test_a_label_file_rejects_another_model_and_other_options(checkpoint, clip, tmp_path):
    command = [str(checkpoint), str(clip), "--output", str(tmp_path / "out.jsonl")]
    assert predict.main(command) == 0
    assert predict.main([*command, "--batch-size", "3"]) == 0  # does not affect the labels
    for option, name in [
        (["--keep-rate", "0.7"], "keep_rates"),
        (["--top-k", "2"], "top_k"),
        (["--overlap", "0"], "overlap"),
        (["--windows"], "windows"),
        (["--amp", "bf16"], "amp"),
        (["--score", "intensity"], "sha256"),
    ]:
        with pytest.raises(UserError, match=f"made with other settings.*{name}: "):
            predict.main([*command, *option])
    model = make_model(keep_rate=0.5)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[7] += 1e-3
    save(tmp_path, model)
    with pytest.raises(UserError, match="made with other settings.*sha256: "):
        predict.main(command)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_a_clip_with_a_score_that_is_not_finite_gets_no_label(clip, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.head.bias[2] = math.nan
    checkpoint, output = save(tmp_path, model), tmp_path / "out.jsonl"
    assert predict.main([str(checkpoint), str(clip), "--output", str(output)]) == 1
    (failed,) = (tmp_path / "out.jsonl.failed.jsonl").read_text().splitlines()
    assert output.read_text() == "" and "not finite" in json.loads(failed)["error"]


@pytest.mark.parametrize("name", ["audiomae_tiny", "ast_tiny"])
def test_the_picture_shows_the_kept_patches(name, tmp_path, drawn):
    """With the intensity score, the kept patches are the loudest of the picture, in any token order."""
    time = np.arange(12000) / 16000
    noise = 1e-3 * np.random.default_rng(0).standard_normal(12000)
    wave = torch.from_numpy(np.where(time < 0.16, np.sin(2 * np.pi * 300 * time), noise)).float()
    model = make_model(name, keep_rate=0.25, score="intensity")
    model.features, model.labels = FEATURES, LABELS
    clip = windows.Clip(str(tmp_path / "a.wav"), wave, [0], [torch.tensor([0.1, 0.7, 0.1, 0.1])])
    pictures.draw_clip(model, clip, "cpu")
    loudness = torch.from_numpy(drawn["fbank"]).reshape(8, 16, 8, 16).mean((1, 3)).T  # [mel, time]
    assert [name for name, _ in drawn["kept"]] == ["after block 1", "after block 2", "after block 3"]
    for (_, grid), count in zip(drawn["kept"], (16, 4, 1), strict=True):
        loudest = loudness.flatten().topk(count).values.min()
        assert grid.shape == (8, 8) and grid.sum() == count
        assert np.array_equal(grid, (loudness >= loudest).numpy())
    # The tone is low and in the first column, so a transposed or mirrored grid would look different.
    assert np.argwhere(drawn["kept"][-1][1]).tolist() == [[1, 0]]
    assert drawn["title"] == "a.wav: siren (0.70)" and "keep-rate 0.25, patches 64 → 16 → 4 → 1" in drawn["subtitle"]
    assert drawn["sounding"] == 1 + (12000 - 400) // 160 and drawn["start"] == 0


def test_the_picture_of_a_long_clip_shows_the_window_with_the_highest_score(tmp_path, drawn):
    model = make_model()
    model.features, model.labels = FEATURES, LABELS
    wave = torch.randn(3 * WINDOW)
    scores = [torch.tensor(row) for row in ([0.6, 0.4, 0, 0], [0.1, 0.9, 0, 0], [0.2, 0.8, 0, 0])]
    clip = windows.Clip(str(tmp_path / "a.wav"), wave, [0, WINDOW, 2 * WINDOW], scores)
    pictures.draw_clip(model, clip, "cpu")
    expected = FeatureExtractor(FEATURES)(wave[None, WINDOW : 2 * WINDOW])[0]
    assert np.allclose(drawn["fbank"], expected.numpy()) and drawn["start"] == WINDOW / 16000
    assert drawn["title"].endswith("siren (0.70)")
    assert drawn["kept"] == [] and "keep-rate 1: no patch is pruned" in drawn["subtitle"]


def test_a_picture_is_written(checkpoint, clip, tmp_path):
    pytest.importorskip("matplotlib")
    assert predict.main([str(checkpoint), str(clip), "--plot", str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="the folder .*no does not exist"):
        predict.main([str(checkpoint), str(clip), "--plot", str(tmp_path / "no" / "a.png")])


def test_each_clip_gets_its_own_picture(checkpoint, clip, tmp_path, drawn, monkeypatch):
    saved = []
    monkeypatch.setattr(
        plot, "save_figure", lambda figure, path: saved.append((drawn["title"].split(":")[0], path.name))
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "clip.wav").symlink_to(clip)
    predict.main([str(checkpoint), str(clip), str(tmp_path / "b"), "--plot", str(tmp_path / "out.png")])
    assert saved == [("clip.wav", "out-clip.png"), ("clip.wav", "out-clip-2.png")]


def test_invalid_options_are_errors(checkpoint, clip, tmp_path):
    before = checkpoint.read_bytes()
    for options, message in [
        (["--keep-rate", "0"], "keep_rate.*got 0"),
        (["--overlap", "1"], "--overlap 1.0"),
        (["--top-k", "0"], "--top-k 0"),
        (["--workers", "-1"], "--workers -1"),
        (["--output", str(checkpoint)], "must end in .jsonl or .parquet"),
        (["--output", str(tmp_path / "no" / "a.jsonl")], "the folder .*no does not exist"),
        (["--plot", str(tmp_path / "a.jpeg")], "must end in .png"),
        (["--label-csv", str(tmp_path / "labels.csv")], "labels.csv names 1 classes, the checkpoint has 4"),
    ]:
        (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/1,one\n")
        with pytest.raises(UserError, match=message):
            predict.main([str(checkpoint), str(clip), *options])
    assert checkpoint.read_bytes() == before
    with pytest.raises(UserError):
        predict.main([str(tmp_path / "missing.safetensors"), str(clip)])


def test_real_clips(real_audio, tmp_path, capsys):
    """Ogg and FLAC clips of one and five seconds in one run, by folder and by manifest."""
    words = sorted((real_audio / "speech_commands_ar" / "audio").rglob("*.o*"))[:2]
    sounds = sorted((real_audio / "esc10" / "audio").rglob("*.flac"))[:2]
    manifest = tmp_path / "words.json"
    manifest.write_text(json.dumps({"data": [{"wav": str(path)} for path in words]}))
    checkpoint = save(tmp_path, make_model(keep_rate=0.5))
    code, rows = run(capsys, checkpoint, manifest, *sounds, "--batch-size", 3, "--windows", "--workers", 2)
    assert code == 0 and [len(row["windows"]) for row in rows] == [1, 1, 7, 7]
    model = make_model(keep_rate=0.5)
    expected = logits_of(model, load_audio(words[1])).softmax(-1).max()
    assert rows[1]["scores"][0] == pytest.approx(float(expected), abs=1e-5)
