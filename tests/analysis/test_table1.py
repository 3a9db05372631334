import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pruneattn import train
from pruneattn.analysis import table1
from pruneattn.analysis.table1 import Cell, Table, compare, make_cells, table_lines
from pruneattn.checkpoints.pretrained import load_pretrained
from pruneattn.data.toy import make_sound
from pruneattn.errors import UserError

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

MODEL = "--model ast --size tiny --embed-dim 16 --num-heads 1 --depth 3 --prune-blocks 0 1 --frames 64 --no-tensorboard"
RECIPE = "--epochs 2 --batch-size 4 --shrink-start 1 --shrink-epochs 0 --warmup-epochs 0 --mean -9 --std 4 --device cpu"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of train for a tiny model on 12 + 6 + 6 clips of two kinds."""
    folder = tmp_path_factory.mktemp("table1_clips")
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        for label in ("noise", "tone"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                wave = make_sound(label, np.random.default_rng((number, len(split), len(label))))
                soundfile.write(folder / split / label / f"{number}.wav", wave, 16000)
    return [*MODEL.split(), *RECIPE.split(), "--dataset", "folder", "--data-dir", str(folder)]


def predictions(right, multilabel=False, classes=2):
    """Saved predictions of clips that are told right (1) or wrong (0)."""
    right = np.asarray(right)
    targets = np.eye(classes)[np.arange(len(right)) % classes]
    logits = np.where(right[:, None] == 1, targets, 1 - targets)
    return {"logits": logits, "targets": targets, "index": np.arange(len(right)), "multilabel": multilabel, "macs": 2e9}


def test_cells_unpruned_first_and_seed_by_seed():
    cells = make_cells(("attention", "random"), (0.7, 0.5), (3, 4))
    assert len(cells) == 2 + 8 and cells[:2] == [Cell("unpruned", 1.0, 3), Cell("unpruned", 1.0, 4)]
    assert [cell.seed for cell in cells[2:]] == [3] * 4 + [4] * 4
    assert len({cell.name for cell in cells}) == 10 and cells[2].name == "attention-0.7-seed3"
    for rate in (0.0, 1.0, 1.5):
        with pytest.raises(UserError, match=f"--keep-rates {rate:g}"):
            make_cells(("random",), (0.5, rate), (0,))


@pytest.mark.parametrize("word", ["--seed", "--keep-rate=0.5", "--output", "--score", "--branch-from"])
def test_options_of_a_cell_are_refused(tmp_path, options, word):
    with pytest.raises(UserError, match=f"{word.split('=')[0]}: every cell"):
        Table(tmp_path, make_cells(("random",), (0.5,), (0,)), [*options, word])


def test_wrong_training_options_end_before_any_training(tmp_path, options):
    with pytest.raises(UserError, match="--shrink-start"):
        Table(tmp_path, make_cells(("random",), (0.5,), (0,)), [*options, "--epochs", "1"])


def test_whole_table_from_training_to_files(tmp_path, options, analysis_script, capsys):
    """Trained for real; a run that was killed half-way goes on, and the table says what is missing until then."""
    script, output = analysis_script("table1"), tmp_path / "out"
    command = ["--rankings", "attention", "random", "--keep-rates", "0.5", "--seeds", "0", "--output", str(output)]
    assert script.main([*command, "--report", "--", *options]) == 0
    assert "3 of 3 runs are missing: unpruned-seed0, attention-0.5-seed0, random-0.5-seed0" in capsys.readouterr().out

    killed = output / "random-0.5-seed0"  # before its first checkpoint
    killed.mkdir()
    (killed / "config.json").write_text("{}")
    assert script.main([*command, "--", *options]) == 0
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
    # The pruned runs share the unpruned one's first epoch.
    logs = [(output / f"{name}-seed0" / "log.jsonl").read_text() for name in ("unpruned", "random-0.5")]
    first = [json.loads(log.splitlines()[0]) for log in logs]
    assert first[0]["kind"] == "epoch" and first[0]["train_loss"] == first[1]["train_loss"]


def test_predictions_are_multilabel_as_the_training_is(tmp_path, options):
    """Each test clip has one label here, while training clips have two."""
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


def test_a_stopped_run_is_resumed_and_ends_the_command(tmp_path, options, monkeypatch):
    commands = []

    def stopped(command):
        commands.append(command)
        (tmp_path / "unpruned-seed0").mkdir(exist_ok=True)
        (tmp_path / "unpruned-seed0" / "last.pt").touch()
        return 130

    monkeypatch.setattr(train, "main", stopped)
    table = Table(tmp_path, make_cells(("random",), (0.5,), (0,)), options)
    assert table.train_next() == 130 and "--resume" not in commands[0]
    assert table.train_next() == 130 and commands[1] == [*commands[0], "--resume"]
    assert table.missing() == table.cells


def test_cells_are_shared_and_wait_for_their_trunk(tmp_path, options, monkeypatch):
    filelock = pytest.importorskip("filelock")
    begun = []
    monkeypatch.setattr(Table, "_train", lambda self, cell: begun.append(cell.name) or 0)
    monkeypatch.setattr(
        Table,
        "_predict",
        lambda self, cell: self.predictions(cell).parent.mkdir(exist_ok=True) or self.predictions(cell).touch(),
    )
    table = Table(tmp_path, make_cells(("attention", "random"), (0.5,), (0,)), options)
    with filelock.FileLock(tmp_path / ".unpruned-seed0.lock"):
        assert table.train_next() == "wait" and begun == []  # another process is at the only cell without a trunk
        (tmp_path / "unpruned-seed0").mkdir()
        (tmp_path / "unpruned-seed0" / "trunk.pt").touch()
        with filelock.FileLock(tmp_path / ".attention-0.5-seed0.lock"):
            assert table.train_next() == "trained" and begun == ["random-0.5-seed0"]
            assert table.train_next() == "wait"
    assert [table.train_next() for _ in range(3)] == ["trained", "trained", "done"]
    assert begun == ["random-0.5-seed0", "unpruned-seed0", "attention-0.5-seed0"]


def test_runs_of_other_options_do_not_share_a_table(tmp_path, options):
    Table(tmp_path, make_cells(("random",), (0.5,), (0,)), options)
    Table(tmp_path, make_cells(("attention",), (0.3,), (4,)), [*options, "--workers", "1"])  # no matter for the result
    with pytest.raises(UserError, match=r"options.json.*lr: 0.003 -> 0.1\): give the same, or another --output"):
        Table(tmp_path, make_cells(("random",), (0.5,), (0,)), [*options, "--lr", "0.1"])


def test_a_trunk_that_is_gone_is_not_waited_for(tmp_path, options):
    table = Table(tmp_path, make_cells(("random",), (0.5,), (0,)), options)
    (tmp_path / "unpruned-seed0").mkdir()
    for name in ("predictions.npz", "result.json"):
        (tmp_path / "unpruned-seed0" / name).touch()
    with pytest.raises(UserError, match="trunk.pt is gone, from which random-0.5-seed0"):
        table.train_next()


def test_paired_comparison_by_hand():
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
