import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import pruneattn
from pruneattn import predict
from pruneattn.data import FeatureConfig
from pruneattn.data.toy import make_sound
from pruneattn.errors import UserError

LABELS = ["buzz", "siren", "tone", "noise"]


@pytest.fixture
def script(load_file):
    return load_file(Path(__file__).parents[2] / "python" / "label_with_ray.py")


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(1)
    model = pruneattn.create_model(
        "audiomae_tiny",
        num_classes=4,
        frames=128,
        embed_dim=48,
        depth=4,
        num_heads=3,
        prune_blocks=(0, 1, 2),
        keep_rate=0.5,
    )
    torch.nn.init.normal_(model.head.weight)
    path = tmp_path / "best.safetensors"
    features = FeatureConfig(frames=128, mean=-11.0, std=3.0)
    pruneattn.save_pretrained(model, path, features=features, labels=LABELS, multilabel=False)
    return path


@pytest.fixture
def cluster(monkeypatch):
    """Ray on this machine, without connections to other machines."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(pruneattn.__file__).parents[1]))
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        configure_logging=False,
        address="local",
    )
    yield
    ray.shutdown()


def write_sounds(folder, count):
    """Clips of 1 to 3 windows, and a file that is not a sound file."""
    folder.mkdir()
    for number in range(count):
        wave = np.tile(make_sound(LABELS[number % 4], np.random.default_rng(number)), 1 + number % 3)
        soundfile.write(folder / f"{number}.wav", wave, 16000)
    (folder / "bad.wav").write_text("no sound")


def read(path):
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["path"])


def test_actors_label_like_predict(script, checkpoint, tmp_path):
    """Decoding and labeling without Ray, batch by batch."""
    pytest.importorskip("pyarrow")
    write_sounds(tmp_path / "sounds", 4)
    command = [str(checkpoint), str(tmp_path / "sounds"), "--batch-size", "3", "--windows", "--output"]
    output = tmp_path / "labels.jsonl"
    assert predict.main([*command, str(output)]) == 0
    expected = [*read(output), *read(tmp_path / "labels.jsonl.failed.jsonl")]
    args = script.parse([*command, str(tmp_path / "ray.jsonl")])
    table = script.LabelBatches(args)(script.decode_batch({"path": np.array([row["path"] for row in expected])}))
    rows = [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()]
    assert len(rows) == 5
    for row, other in zip(rows, expected, strict=True):
        if "error" in other:
            assert (row["path"], row["error"]) == (other["path"], other["error"])
        else:
            assert row.keys() == other.keys() and row["labels"] == other["labels"]
            assert len(row["windows"]) == len(other["windows"])
            assert row["scores"] == pytest.approx(other["scores"], abs=1e-5)


@pytest.mark.slow
def test_labels_equal_those_of_predict_although_an_actor_is_lost(script, checkpoint, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "TASK_CLIPS", 4)
    sounds, marker = tmp_path / "sounds", tmp_path / "was killed"
    write_sounds(sounds, 10)
    command = [str(checkpoint), str(sounds), "--batch-size", "3", "--windows", "--output"]
    assert predict.main([*command, str(tmp_path / "predict.jsonl")]) == 0

    class Mortal(script.LabelBatches):
        def __call__(self, batch):
            rows = super().__call__(batch)
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return rows

    monkeypatch.setattr(script, "LabelBatches", Mortal)
    output = tmp_path / "ray.jsonl"
    assert script.main([*command, str(output)]) == 0
    assert marker.exists()

    rows, expected = read(output), read(tmp_path / "predict.jsonl")
    assert [row["path"] for row in rows] == [row["path"] for row in expected]  # each once
    for row, other in zip(rows, expected):
        assert row.keys() == other.keys() and row["seconds"] == other["seconds"] and row["labels"] == other["labels"]
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-5)
        assert [(one["start"], one["end"]) for one in row["windows"]] == [
            (one["start"], one["end"]) for one in other["windows"]
        ]
    assert read(tmp_path / "ray.jsonl.failed.jsonl") == read(tmp_path / "predict.jsonl.failed.jsonl")

    # Each command resumes the work of the other command.
    output.write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    assert script.main([*command, str(output)]) == 0
    assert [row["path"] for row in read(output)] == [row["path"] for row in expected]
    before = output.read_bytes()
    assert predict.main([*command, str(output)]) == 0
    assert output.read_bytes() == before


def test_invalid_options_are_rejected(script, checkpoint, tmp_path):
    command = [str(checkpoint), str(tmp_path), "--output"]
    for options, message in [
        (["a.json"], "must end in .jsonl or .parquet"),
        ([str(tmp_path / "a.jsonl"), "--actors", "0"], "--actors 0"),
        ([str(tmp_path / "a.jsonl"), "--overlap", "1"], "--overlap 1.0"),
    ]:
        with pytest.raises(UserError, match=message):
            script.main([*command, *options])


def test_without_ray_the_extra_is_named(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match=r"ray, which is not installed: pip install 'pruneattn\[ray\]'"):
        next(script.label(None, ["a.wav"]))
