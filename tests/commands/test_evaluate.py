import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import pruneattn
from pruneattn import evaluate
from pruneattn.data import FeatureConfig, FeatureExtractor, load_audio, load_dataset
from pruneattn.data.toy import KINDS, make_sound
from pruneattn.errors import UserError
from pruneattn.metrics import evaluate_predictions
from pruneattn.runtime import distributed, timing
from pruneattn.runtime.timing import measure_speed

pytestmark = pytest.mark.device  # commands and models use the GPU if there is one

LABELS = ["buzz", "siren", "tone"]
FEATURES = FeatureConfig(frames=128, mean=-11.0, std=3.0)


def make_model(name="audiomae_tiny", num_classes=3, **options):
    torch.manual_seed(1)
    model = pruneattn.create_model(
        name, num_classes=num_classes, frames=128, embed_dim=48, depth=4, num_heads=3, prune_blocks=(0, 1, 2), **options
    )
    torch.nn.init.normal_(model.head.weight, std=1.0)  # large, so that clips and keep-rates give different scores
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pruneattn.save_pretrained(
        make_model(keep_rate=0.7), folder / "best.safetensors", features=FEATURES, labels=LABELS, multilabel=False
    )
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of seven clips in three classes."""
    folder = tmp_path_factory.mktemp("clips")
    for number, label in enumerate(["buzz", "siren", "tone", "buzz", "siren", "tone", "tone"]):
        (folder / "test" / label).mkdir(parents=True, exist_ok=True)
        (folder / "train" / label).mkdir(parents=True, exist_ok=True)
        wave = make_sound(label, np.random.default_rng(number))
        soundfile.write(folder / "test" / label / f"{number}.wav", wave, 16000)
    assert set(LABELS) <= set(KINDS)
    return folder


def one_by_one(model, keep_rate, paths):
    """Logits of clips one by one, without the code of the evaluation."""
    model.set_keep_rate(keep_rate)
    extract = FeatureExtractor(FEATURES)
    with torch.no_grad():
        return torch.cat([model(extract(load_audio(path)[None])) for path in paths])


def true_labels(paths):
    return torch.tensor([LABELS.index(path.parent.name) for path in paths])


def run(checkpoint, clips, output, *options):
    code = evaluate.main(
        [str(checkpoint), "--dataset", "folder", "--data-dir", str(clips), "--output", str(output), *map(str, options)]
    )
    assert code == 0
    return json.loads((output / "table.json").read_text())


def test_table_equals_computing_one_by_one(checkpoint, clips, tmp_path, capsys):
    rates = {"1": 1.0, "0.5": 0.5, "0.9,0.4,0.25": [0.9, 0.4, 0.25]}
    table = run(checkpoint, clips, tmp_path, "--keep-rates", *rates, "--batch-size", 3, "--rounds", 1)
    paths = sorted((clips / "test").rglob("*.wav"))
    labels = true_labels(paths)
    model = make_model()
    dense = pruneattn.count_macs(model, 1.0).paper
    right, precise = [], []
    for row, (name, rate) in zip(table["rows"], rates.items(), strict=True):
        logits = one_by_one(model, rate, paths)
        right.append(float((logits.argmax(1) == labels).float().mean()))
        macs = pruneattn.count_macs(model)
        assert row["keep_rate"] == rate
        assert row["top1"] == row["metric"] == pytest.approx(right[-1])
        assert row["top5"] == 1.0
        precise.append(evaluate_predictions(logits, torch.eye(3)[labels], multilabel=False)["map"])
        assert row["map"] == pytest.approx(precise[-1])
        assert row["gmacs_paper"] == pytest.approx(macs.paper / 1e9)
        assert row["gmacs_computed"] == pytest.approx(macs.computed / 1e9)
        theory = 1 - macs.paper / dense
        assert row["theory"] == pytest.approx(theory)
        assert row["saving"] == pytest.approx(1 - table["dense_clips_per_second"] / row["clips_per_second"])
        assert row["realised"] == (pytest.approx(row["saving"] / theory) if theory else None)
        with open(tmp_path / f"per_class_{name.replace(',', '-')}.csv") as file:
            classes = list(csv.DictReader(file))
        assert [one["name"] for one in classes] == LABELS
        assert [int(one["positives"]) for one in classes] == [2, 2, 3]
        recall = [float((logits.argmax(1)[labels == k] == k).float().mean()) for k in range(3)]
        assert [float(one["recall"]) for one in classes] == pytest.approx(recall)
    assert len(set(precise)) > 1, "the keep-rates give equal results, so this test checks nothing"
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in printed
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in printed.splitlines() if line.startswith("|")]
    assert cells[2:] == [[name, f"{top1:.2%}"] for name, top1 in zip(rates, right, strict=True)]
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["keep_rate"] for row in rows] == ["1.0", "0.5", "0.9,0.4,0.25"]
    assert [float(row["top1"]) for row in rows] == pytest.approx(right)
    assert table["clips"] == 7 and not (tmp_path / "failed_clips.txt").exists()


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        ("", [*evaluate.KEEP_RATES]),
        ("--keep-rate 0.7", [0.7]),
        ("--keep-rate 0.9,0.4,0.25", [[0.9, 0.4, 0.25]]),
        ("--keep-rate 0.5,0.5,0.5", [0.5]),
        ("--keep-rates 1 0.5 1 0.5,0.5,0.5", [1.0, 0.5]),
    ],
)
def test_keep_rates_to_evaluate(checkpoint, clips, tmp_path, capsys, words, rates):
    table = run(checkpoint, clips, tmp_path, "--rounds", 0, *words.split())
    assert [row["keep_rate"] for row in table["rows"]] == rates
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "rates"), [("1 0.5", [1.0, 0.5]), ("0.9 0.8 0.7 0.6", [0.9, 0.8, 0.7, 0.6]), ("0.5 0.5 0.5", [0.5])]
)
def test_several_words_after_keep_rate_are_a_sweep_as_before_with_a_warning(
    checkpoint, clips, tmp_path, capsys, words, rates
):
    """These words cannot be one rate for each of the model's three pruning blocks, or both meanings are the same."""
    table = run(checkpoint, clips, tmp_path, "--rounds", 0, "--keep-rate", *words.split())
    assert [row["keep_rate"] for row in table["rows"]] == rates
    warning = f"warning: --keep-rate with several values is deprecated: use --keep-rates {words}\n"
    assert capsys.readouterr().err == warning


@pytest.mark.parametrize("words", ["1 0.7 0.5", "0.9 0.7 0.5"])
def test_as_many_words_after_keep_rate_as_pruning_blocks_are_ambiguous(checkpoint, clips, tmp_path, words):
    message = f"--keep-rates {words} to compare.*--keep-rate {words.replace(' ', ',')} to evaluate.* 3 pruning blocks"
    with pytest.raises(UserError, match=message):
        run(checkpoint, clips, tmp_path / "out", "--keep-rate", *words.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_scores_are_saved_before_the_timing(checkpoint, clips, tmp_path, monkeypatch, capsys, interruption):
    def measure_speed(*args, **options):
        raise interruption

    monkeypatch.setattr(evaluate, "measure_speed", measure_speed)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        run(checkpoint, clips, tmp_path, "--keep-rate", 0.5)
    row = json.loads((tmp_path / "table.json").read_text())["rows"][0]
    printed = capsys.readouterr().out
    assert f"{row['top1']:.2%}" in printed and "clips_per_second" not in row
    assert (tmp_path / "table.md").read_text() in printed


def test_the_score_of_the_checkpoint_is_the_default(checkpoint, clips, tmp_path):
    """Ranking by intensity keeps different patches than the score of the checkpoint."""
    own = run(checkpoint, clips, tmp_path, "--keep-rate", 0.1, "--rounds", 0)
    other = run(checkpoint, clips, tmp_path, "--keep-rate", 0.1, "--rounds", 0, "--score", "intensity")
    paths = sorted((clips / "test").rglob("*.wav"))
    assert own["score"] == "column_mean" and other["score"] == "intensity"
    model = make_model(score="intensity")
    expected = evaluate_predictions(one_by_one(model, 0.1, paths), torch.eye(3)[true_labels(paths)], False)["map"]
    assert other["rows"][0]["map"] == pytest.approx(expected) != own["rows"][0]["map"]
    assert "clips_per_second" not in other["rows"][0] and "dense" not in other


def test_the_checkpoint_says_whether_the_task_is_multilabel(clips, tmp_path):
    """In a small manifest, each clip can have one label by chance."""
    pruneattn.save_pretrained(
        make_model(), tmp_path / "best.safetensors", features=FEATURES, labels=LABELS, multilabel=True
    )
    rows = ["index,mid,display_name", *(f"{number},/m/{label},{label}" for number, label in enumerate(LABELS))]
    (tmp_path / "class_labels_indices.csv").write_text("\n".join(rows))
    paths = sorted((clips / "test").rglob("*.wav"))
    entries = [{"wav": str(path), "labels": f"/m/{path.parent.name}"} for path in paths]
    (tmp_path / "test.json").write_text(json.dumps({"data": entries}))
    options = ["--dataset", "manifest", "--manifest", tmp_path / "test.json", "--keep-rate", 0.5, "--rounds", 0]
    table = run(tmp_path, clips, tmp_path, *options)
    expected = evaluate_predictions(one_by_one(make_model(), 0.5, paths), torch.eye(3)[true_labels(paths)], True)
    assert table["metric"] == "map" and table["rows"][0]["metric"] == pytest.approx(expected["map"])


def test_processes_share_the_clips(checkpoint, clips, monkeypatch):
    """The clips that each of two processes scores, without starting the processes."""
    model = pruneattn.load_pretrained(checkpoint)
    dataset = load_dataset("folder", "test", data_dir=clips, frames=128)
    alone, _ = evaluate.score_keep_rates(model, dataset, [1.0, 0.5], "cpu")
    parts = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda part: parts.append(part) or parts)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        together, failed = evaluate.score_keep_rates(model, dataset, [1.0, 0.5], "cpu", batch_size=2)
    (first, _), (second, _) = parts
    # Each clip appears once, although 2 does not divide 7.
    assert sorted([*first[2].tolist(), *second[2].tolist()]) == list(range(7))
    assert failed == []
    for name in ("map", "mauc", "top1"):
        assert [one[name] for one in together] == pytest.approx([one[name] for one in alone])


def test_a_model_without_features_is_an_error(clips):
    dataset = load_dataset("folder", "test", data_dir=clips, frames=128)
    with pytest.raises(UserError, match="set the model's features"):
        evaluate.score_keep_rates(make_model(), dataset, [1.0], "cpu")


@pytest.mark.slow
def test_two_processes_agree_with_one(checkpoint, clips, tmp_path):
    options = ["--keep-rates", "1", "0.5", "--rounds", "0", "--batch-size", "2"]
    one = run(checkpoint, clips, tmp_path / "one", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "pruneattn.evaluate", str(checkpoint), "--dataset", "folder", "--data-dir", str(clips)]
    command += ["--output", str(tmp_path / "two"), "--device", "cpu", *options]
    root = str(Path(pruneattn.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "table.json").read_text())
    assert two["clips"] == one["clips"] == 7  # each clip once, although 2 does not divide 7
    for row_one, row_two in zip(one["rows"], two["rows"], strict=True):
        assert row_two == pytest.approx(row_one)
    assert done.stdout.count("| keep-rate |") == 1  # one process prints


def test_unreadable_clips_are_left_out_and_listed(checkpoint, clips, tmp_path, capsys):
    good = run(checkpoint, clips, tmp_path / "good", "--keep-rate", 0.5, "--rounds", 0)
    mixed = tmp_path / "mixed" / "test"
    for path in (clips / "test").rglob("*.wav"):
        (mixed / path.parent.name).mkdir(parents=True, exist_ok=True)
        (mixed / path.parent.name / path.name).symlink_to(path)
    for label in LABELS:
        (tmp_path / "mixed" / "train" / label).mkdir(parents=True)
    (mixed / "buzz" / "empty.wav").touch()
    (mixed / "siren" / "text.wav").write_text("I am no sound")
    soundfile.write(mixed / "tone" / "short.wav", np.ones(160) * 0.1, 16000)
    soundfile.write(mixed / "tone" / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    capsys.readouterr()
    table = run(checkpoint, tmp_path / "mixed", tmp_path / "out", "--keep-rate", 0.5, "--rounds", 0)
    assert table["clips"] == 7 and table["failed"] == 4
    assert table["rows"] == [pytest.approx(good["rows"][0])]
    listed = (tmp_path / "out" / "failed_clips.txt").read_text().splitlines()
    names = sorted(Path(line.split("\t")[0]).name for line in listed)
    assert names == ["empty.wav", "nan.wav", "short.wav", "text.wav"]
    assert all(line.split("\t")[1] for line in listed)
    printed = capsys.readouterr().out
    assert "4 of 11 clips could not be read" in printed and "text.wav" in printed


def test_invalid_options_are_errors(checkpoint, clips, tmp_path):
    with pytest.raises(UserError, match="keep_rate.*got 0"):
        run(checkpoint, clips, tmp_path, "--keep-rate", 0)
    with pytest.raises(UserError, match="3 classes, the dataset 10"):
        evaluate.main([str(checkpoint), "--dataset", "toy", "--output", str(tmp_path)])
    renamed = tmp_path / "renamed" / "test"
    renamed.mkdir(parents=True)
    for label, other in zip(LABELS, ("buzz", "horn", "tone"), strict=True):
        (renamed / other).symlink_to(clips / "test" / label)
        (tmp_path / "renamed" / "train" / other).mkdir(parents=True)
    with pytest.raises(UserError, match="do not match.*class 1 is 'siren' in the checkpoint and 'horn'"):
        run(checkpoint, tmp_path / "renamed", tmp_path)
    with pytest.raises(UserError, match="--batch-size 0"):
        run(checkpoint, clips, tmp_path, "--batch-size", 0)
    with pytest.raises(UserError, match="--num-classes.* to checkpoints of other projects"):
        run(checkpoint, clips, tmp_path, "--num-classes", 3)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another folder with --output"):
        run(checkpoint, clips, tmp_path / "file" / "below")
    assert not list(tmp_path.glob("table*"))  # nothing was written


def test_results_are_saved_next_to_the_checkpoint(checkpoint, clips):
    options = ["--dataset", "folder", "--data-dir", str(clips), "--rounds", "0", "--keep-rate", "1"]
    evaluate.main([str(checkpoint), *options])
    assert (checkpoint / "evaluation-folder-test" / "table.csv").is_file()


def test_checkpoint_of_another_project(clips, tmp_path):
    """A file in AudioMAE's layout, described by options and padded with 0."""
    model = pruneattn.create_model("audiomae_tiny", num_classes=3, frames=128)
    torch.nn.init.normal_(model.head.weight, std=1.0)
    torch.save({"model": model.state_dict()}, tmp_path / "finetuned.pth")
    options = ["--model", "audiomae_tiny", "--num-classes", 3, "--frames", 128, "--mean", -11, "--std", 3]
    table = run(tmp_path / "finetuned.pth", clips, tmp_path, *options, "--keep-rate", 0.5, "--rounds", 0)
    paths = sorted((clips / "test").rglob("*.wav"))
    labels = true_labels(paths)
    extract = FeatureExtractor(FeatureConfig(frames=128, mean=-11.0, std=3.0, padding="zero"))
    model.eval().set_keep_rate(0.5)
    with torch.no_grad():
        logits = torch.cat([model(extract(load_audio(path)[None])) for path in paths])
    assert table["rows"][0]["top1"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    headless = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head")}
    torch.save({"model": headless}, tmp_path / "pretrained.pth")
    with pytest.raises(UserError, match="lacks head.*never fine-tuned"):
        run(tmp_path / "pretrained.pth", clips, tmp_path, *options)


def test_the_default_output_is_next_to_the_checkpoint_or_in_the_current_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, expected in (
        (checkpoint, checkpoint),
        (checkpoint / "best.safetensors", checkpoint),
        ("user/name", Path()),
    ):
        args = argparse.Namespace(checkpoint=str(given), output=None, dataset="toy", split="test")
        assert evaluate._make_output(args) == expected / "evaluation-toy-test"
    assert os.listdir(tmp_path) == ["evaluation-toy-test"]


def test_real_clips(real_audio, tmp_path):
    """ESC-10 through its reader, with an AST model of five seconds: every clip is counted."""
    torch.manual_seed(0)
    dataset = load_dataset("esc50", "test", data_dir=real_audio / "esc10", fold=1, frames=512)
    model = pruneattn.create_model(
        "ast_tiny", num_classes=50, frames=512, embed_dim=48, depth=3, num_heads=3, prune_blocks=(1,)
    )
    features = FeatureConfig(frames=512, mean=-6.6, std=5.4)
    path = tmp_path / "m.safetensors"
    pruneattn.save_pretrained(model, path, features=features, labels=dataset.labels, multilabel=False)
    options = ["--dataset", "esc50", "--data-dir", str(real_audio / "esc10"), "--fold", "1"]
    code = evaluate.main([str(path), *options, "--rounds", "0", "--keep-rate", "0.5"])
    table = json.loads((tmp_path / "evaluation-esc50-test-fold1" / "table.json").read_text())
    assert code == 0 and table["clips"] == len(dataset) == 80 and table["failed"] == 0
    assert 0 <= table["rows"][0]["top1"] <= 1


def test_the_speed_baseline_is_the_fastest_dense_variant(monkeypatch):
    seen = []

    def fake(variants, device, rounds):
        seen.extend(variants)
        for function in variants.values():
            function()
        seconds = {"optimized": 2.0, "compiled": 1.0, "eager, SDPA": 3.0}
        return {(rate, name): [seconds[name] * rate] * 3 for rate, name in variants}

    monkeypatch.setattr(timing, "interleaved_rounds", fake)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    speed = measure_speed(make_model(), [0.5], "cpu", batch_size=2, compiled=True)
    pruned = [(0.5, "optimized"), (0.5, "compiled")]
    assert seen == [(1.0, "optimized"), (1.0, "compiled"), *pruned, (1.0, "eager, SDPA")]
    assert speed.dense == "compiled" and speed.dense_clips_per_second == 2.0
    assert speed.row(0.5, theory=0.6) == {
        "clips_per_second": 4.0,
        "clips_per_second_optimized": 2.0,
        "clips_per_second_compiled": 4.0,
        "saving": 0.5,
        "realised": pytest.approx(0.5 / 0.6),
    }
    assert speed.row(1.0, theory=0.0)["realised"] is None


def test_speed_is_measured_in_the_requested_precision(monkeypatch):
    """float16 has no packed weights on a CPU: the unchanged model runs inside autocast."""
    seen = {}

    def fake(variants, device, rounds):
        seen.update({name: function().dtype for name, function in variants.items()})
        return {name: [1.0] for name in variants}

    monkeypatch.setattr(timing, "interleaved_rounds", fake)
    model = make_model()
    measure_speed(model, [0.5], "cpu", amp="fp16", batch_size=2)
    assert seen == dict.fromkeys([(1.0, "eager"), (0.5, "eager"), (1.0, "eager, SDPA")], torch.float16)
    seen.clear()
    measure_speed(model, [0.5], "cpu", amp="bf16", batch_size=2)
    assert seen == dict.fromkeys([(1.0, "optimized"), (0.5, "optimized"), (1.0, "eager, SDPA")], torch.bfloat16)
    assert model.head.weight.dtype == torch.float32  # the model itself is unchanged


def test_pruned_copies_share_the_weights():
    model = make_model()
    half = timing._at_keep_rate(model, 0.5)
    assert half.keep_rates == (0.5,) * 3 and model.keep_rates == (1.0,) * 3
    assert half.head.weight is model.head.weight
    fbank = torch.randn(2, 128, 128)
    model.set_keep_rate(0.5)
    with torch.no_grad():
        assert torch.equal(half(fbank), model(fbank))
