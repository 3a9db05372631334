import csv
import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pruneattn.analysis import table1
from pruneattn.analysis.__main__ import main
from pruneattn.analysis.table1 import Cell, Table, compare, make_cells, table_lines
from pruneattn.checkpoints.pretrained import load_pretrained
from pruneattn.data.toy import make_sound
from pruneattn.errors import UserError
from pruneattn.runtime.signals import StopRequest
from pruneattn.training import run as training_run
from pruneattn.training.engine import Stopped

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

MODEL = "--model ast --size tiny --embed-dim 16 --num-heads 1 --depth 3 --prune-blocks 0 1 --frames 64 --no-tensorboard"
RECIPE = "--epochs 2 --batch-size 4 --shrink-start 1 --shrink-epochs 0 --warmup-epochs 0 --mean -9 --std 4 --device cpu"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of training for a tiny model on 12 + 6 + 6 clips of two classes."""
    folder = tmp_path_factory.mktemp("table1_clips")
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        for label in ("noise", "tone"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                wave = make_sound(label, np.random.default_rng((number, len(split), len(label))))
                soundfile.write(folder / split / label / f"{number}.wav", wave, 16000)
    return [*MODEL.split(), *RECIPE.split(), "--dataset", "folder", "--data-dir", str(folder)]


def predictions(right, multilabel=False, classes=2):
    """Saved predictions for clips: right (1) or wrong (0)."""
    right = np.asarray(right)
    targets = np.eye(classes)[np.arange(len(right)) % classes]
    logits = np.where(right[:, None] == 1, targets, 1 - targets)
    return {"logits": logits, "targets": targets, "index": np.arange(len(right)), "multilabel": multilabel, "macs": 2e9}


def test_cells_start_with_the_unpruned_runs_and_are_ordered_by_seed():
    cells = make_cells(("attention", "random"), (0.7, 0.5), (3, 4))
    assert len(cells) == 2 + 8 and cells[:2] == [Cell("unpruned", 1.0, 3), Cell("unpruned", 1.0, 4)]
    assert [cell.seed for cell in cells[2:]] == [3] * 4 + [4] * 4
    assert len({cell.name for cell in cells}) == 10 and cells[2].name == "attention-0.7-seed3"
    for rate in (0.0, 1.0, 1.5):
        with pytest.raises(UserError, match=f"--keep-rates {rate:g}"):
            make_cells(("random",), (0.5, rate), (0,))


@pytest.mark.parametrize("word", ["--seed", "--keep-rate=0.5", "--output", "--score", "--branch-from"])
def test_options_of_a_cell_are_rejected(tmp_path, options, word):
    with pytest.raises(UserError, match=f"{word.split('=')[0]}: every cell"):
        Table(tmp_path, make_cells(("random",), (0.5,), (0,)), [*options, word])


def test_invalid_training_options_are_rejected_before_any_training(tmp_path, options):
    with pytest.raises(UserError, match="--shrink-start"):
        Table(tmp_path, make_cells(("random",), (0.5,), (0,)), [*options, "--epochs", "1"])


def test_a_complete_table_from_training_to_files(tmp_path, options, analyze, capsys):
    """All cells are trained. A run that was killed starts again. The table names the missing cells."""
    output = tmp_path / "out"
    command = ["--rankings", "attention", "random", "--keep-rates", "0.5", "--seeds", "0", "--output", output]
    analyze("table1", *command, "--report", "--", *options)
    assert "3 of 3 runs are missing: unpruned-seed0, attention-0.5-seed0, random-0.5-seed0" in capsys.readouterr().out

    killed = output / "random-0.5-seed0"  # killed before its first checkpoint
    killed.mkdir()
    (killed / "config.json").write_text("{}")
    analyze("table1", *command, "--", *options)
    text = capsys.readouterr().out
    assert "missing" not in text.split("ast_tiny on folder")[1]
    for name, score, rate in (("unpruned", "cls", 1.0), ("attention-0.5", "cls", 0.5), ("random-0.5", "random", 0.5)):
        model = load_pretrained(output / f"{name}-seed0")
        assert model.score == score and model.keep_rates == (rate, rate)
        result = json.loads((output / f"{name}-seed0" / "result.json").read_text())
        with np.load(output / f"{name}-seed0" / "predictions.npz") as saved:
            assert saved["logits"].shape == (6, 2) and saved["index"].tolist() == list(range(6))
            right = (saved["logits"].argmax(1) == saved["targets"].argmax(1)).mean()
        assert right == pytest.approx(result["test"]["top1"])
    with open(output / "table1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ranking"] for row in rows] == ["unpruned", "attention", "random"]
    assert all(row["seeds"] == "1" and row["units"] == "6" and row["metric_name"] == "top-1" for row in rows)
    assert float(rows[1]["gmacs_paper"]) < float(rows[0]["gmacs_paper"])
    assert float(rows[2]["difference"]) == pytest.approx(float(rows[2]["metric"]) - float(rows[0]["metric"]))
    assert (output / "table1.png").stat().st_size > 5000 and (output / "table1.pdf").exists()
    # The pruned runs share the first epoch of the unpruned run.
    logs = [(output / f"{name}-seed0" / "log.jsonl").read_text() for name in ("unpruned", "random-0.5")]
    first = [json.loads(log.splitlines()[0]) for log in logs]
    assert first[0]["kind"] == "epoch" and first[0]["train_loss"] == first[1]["train_loss"]


def test_predictions_are_multilabel_as_the_training_is(tmp_path, options):
    """Each test clip has one label, but training clips have two."""
    clips = Path(options[-1])
    (tmp_path / "class_labels_indices.csv").write_text("index,mid,display_name\n0,n,noise\n1,t,tone\n")
    manifests = []
    for split in ("train", "val", "test"):
        paths = sorted((clips / split).rglob("*.wav"))
        entries = [{"wav": str(path), "labels": "n,t" if split == "train" else path.parent.name[0]} for path in paths]
        (tmp_path / f"{split}.json").write_text(json.dumps({"data": entries}))
        manifests += [f"--{split}-manifest", str(tmp_path / f"{split}.json")]
    table = Table(tmp_path, [Cell("unpruned", 1.0, 0)], [*options, "--dataset", "manifest", *manifests])
    assert table.train_next() == "trained"
    with np.load(table.predictions(table.cells[0])) as saved:
        assert saved["multilabel"] and (saved["targets"].sum(1) == 1).all()


def test_a_stopped_run_ends_the_command_and_is_resumed(tmp_path, options, monkeypatch, capsys):
    runs = []

    def stopped(train_options, recipe):
        runs.append((train_options, recipe))
        (tmp_path / "unpruned-seed0").mkdir(exist_ok=True)
        (tmp_path / "unpruned-seed0" / "last.pt").touch()
        raise Stopped(15, "saved in epoch 1")

    monkeypatch.setattr(table1, "run_training", stopped)
    table = Table(tmp_path, make_cells(("random",), (0.5,), (0,)), options)
    with pytest.raises(Stopped):
        table.train_next()
    assert table.missing() == table.cells
    command = ["table1", "--rankings", "random", "--keep-rates", "0.5", "--output", str(tmp_path), "--", *options]
    assert main(command) == 128 + 15
    text = capsys.readouterr().out
    assert "stopped by SIGTERM; saved in epoch 1; to resume, run the same command again" in text
    assert "2 of 2 runs are missing" in text and (tmp_path / "table1.csv").exists()
    assert [run_options.resume for run_options, _ in runs] == [None, "last.pt"]
    assert runs[0] == (dataclasses.replace(runs[1][0], resume=None), runs[1][1])

    def interrupted(train_options, recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(table1, "run_training", interrupted)
    assert main(command) == 130 and "nothing new is saved" in capsys.readouterr().out


def test_training_stops_at_a_signal(tmp_path, options, monkeypatch):
    class Stopping(StopRequest):
        def __enter__(self):
            super().__enter__()
            os.kill(os.getpid(), signal.SIGTERM)
            return self

    monkeypatch.setattr(training_run, "StopRequest", Stopping)
    table = Table(tmp_path, [Cell("unpruned", 1.0, 0)], options)
    with pytest.raises(Stopped) as stopped:
        table.train_next()
    assert stopped.value.signum == signal.SIGTERM and (tmp_path / "unpruned-seed0" / "last.pt").exists()
    monkeypatch.undo()
    assert [table.train_next(), table.train_next()] == ["trained", "done"]  # resumed
    steps = [json.loads(line) for line in (tmp_path / "unpruned-seed0" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in steps if line["kind"] == "epoch"] == [0, 1]


def test_cells_are_shared_and_wait_for_their_trunk(tmp_path, options, monkeypatch):
    filelock = pytest.importorskip("filelock")
    trained_cells = []
    monkeypatch.setattr(Table, "_train", lambda self, cell: trained_cells.append(cell.name))
    monkeypatch.setattr(
        Table,
        "_predict",
        lambda self, cell: self.predictions(cell).parent.mkdir(exist_ok=True) or self.predictions(cell).touch(),
    )
    table = Table(tmp_path, make_cells(("attention", "random"), (0.5,), (0,)), options)
    with filelock.FileLock(tmp_path / ".unpruned-seed0.lock"):
        # Another process trains the only cell that needs no trunk.
        assert table.train_next() == "wait" and trained_cells == []
        (tmp_path / "unpruned-seed0").mkdir()
        (tmp_path / "unpruned-seed0" / "trunk.pt").touch()
        with filelock.FileLock(tmp_path / ".attention-0.5-seed0.lock"):
            assert table.train_next() == "trained" and trained_cells == ["random-0.5-seed0"]
            assert table.train_next() == "wait"
    assert [table.train_next() for _ in range(3)] == ["trained", "trained", "done"]
    assert trained_cells == ["random-0.5-seed0", "unpruned-seed0", "attention-0.5-seed0"]


def test_runs_of_other_options_do_not_share_a_table(tmp_path, options):
    Table(tmp_path, make_cells(("random",), (0.5,), (0,)), options)
    other_cells = make_cells(("attention",), (0.3,), (4,))
    Table(tmp_path, other_cells, [*options, "--workers", "1"])  # --workers does not affect the result
    with pytest.raises(UserError, match=r"options.json.*lr: 0.003 -> 0.1\): use the same options, or another --output"):
        Table(tmp_path, make_cells(("random",), (0.5,), (0,)), [*options, "--lr", "0.1"])


def test_a_deleted_trunk_is_an_error(tmp_path, options):
    table = Table(tmp_path, make_cells(("random",), (0.5,), (0,)), options)
    (tmp_path / "unpruned-seed0").mkdir()
    for name in ("predictions.npz", "result.json"):
        (tmp_path / "unpruned-seed0" / name).touch()
    with pytest.raises(
        UserError,
        match="trunk.pt does not exist, and random-0.5-seed0 branches from it: delete the folder .*unpruned-seed0",
    ):
        table.train_next()


def test_paired_comparison_of_small_runs():
    stats = pytest.importorskip("scipy.stats")
    unpruned = {0: predictions([1, 1, 1, 0, 1, 0]), 1: predictions([1, 0, 1, 0, 1, 1]), 2: None}
    ours = [(0, predictions([1, 0, 1, 0, 0, 0])), (1, predictions([1, 0, 0, 1, 1, 1])), (2, predictions([1] * 6))]
    row = compare(ours, unpruned, "random at 0.5")
    paired = np.array([0, -0.5, -0.5, 0.5, -0.5, 0])  # mean over the seeds that have an unpruned run
    assert row["seeds"] == 3 and row["units"] == 6 and row["gmacs_paper"] == 2.0
    assert row["metric"] == pytest.approx((2 / 6 + 4 / 6 + 1) / 3)
    assert row["difference"] == pytest.approx(paired.mean())
    assert row["difference_se"] == pytest.approx(paired.std(ddof=1) / 6**0.5)
    assert row["difference_sd"] == pytest.approx(np.std([-2 / 6, 0], ddof=1))
    a = np.array([[1, 1, 1, 0, 1, 0], [1, 0, 1, 0, 1, 1]]).mean(0)
    b = np.array([[1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 1, 1]]).mean(0)
    assert row["p"] == pytest.approx(stats.ttest_rel(b, a).pvalue)
    empty = compare([(0, None)], unpruned, "random at 0.3")
    assert empty["seeds"] == 0 and empty["metric"] is None and empty["difference"] is None


def test_runs_on_other_clips_are_not_compared():
    other = predictions([1, 0])
    other["index"] = np.array([4, 5])
    with pytest.raises(UserError, match="random at 0.5, seed 0: tested on other clips"):
        compare([(0, other)], {0: predictions([1, 1])}, "random at 0.5")


def test_table_in_the_papers_layout():
    unpruned = {0: predictions([1, 1, 1, 0])}
    rows = [
        {"ranking": "unpruned", "keep_rate": 1.0, **compare(list(unpruned.items()), {}, "")},
        {"ranking": "attention", "keep_rate": 0.5, **compare([(0, predictions([1, 0, 1, 0]))], unpruned, "")},
        {"ranking": "random", "keep_rate": 0.5, **compare([(0, None)], unpruned, "")},
    ]
    lines = table_lines(rows, ("attention", "random"))
    assert lines[0] == "| keep-rate | GMACs | attention | random |"
    assert lines[2:] == ["| 1 (unpruned) | 2 | 75.00 |  |", "| 0.5 | 2 | 50.00 (-25.00 ± 25.00) | - |"]
    assert table1.plot_table1(rows, ("attention", "random"), "t").axes[0].get_ylabel() == "top-1 (%)"
