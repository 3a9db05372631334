import json
import os
import resource
import shutil
import sys

import pytest
import torch

from pruneattn import data
from pruneattn.checkpoints.pretrained import load_pretrained
from pruneattn.data import load_dataset, make_loader
from pruneattn.data.augment import Augment
from pruneattn.data.clips import ClipDataset
from pruneattn.errors import UserError
from pruneattn.runtime.inference import evaluate_model
from pruneattn.training import engine
from pruneattn.training.engine import Trainer
from pruneattn.training.seed import seed_step

pytestmark = pytest.mark.device  # commands and models use the GPU if there is one

QUICK = "--lr 0.06 --warmup-epochs 1 --epochs 18 --shrink-start 4 --shrink-epochs 4 --prune-blocks 1 2".split()


def test_a_run_learns_and_writes_all_its_files(train, clips):
    run = train("run", *train.plain, *QUICK, "--mean", -9, "--std", 3)
    epochs = train.log(run, "epoch")
    assert [line["epoch"] for line in epochs] == list(range(18))
    assert epochs[-1]["train_loss"] < 0.5 * epochs[0]["train_loss"]
    assert [line["pruning"] for line in epochs] == [False] * 4 + [True] * 14
    assert [line["keep_rate"][0] for line in epochs[:9:2]] == pytest.approx([1, 1, 1, 0.75, 0.5])
    steps = train.log(run, "step")
    assert [line["step"] for line in steps] == list(range(1, 55))
    assert sum(line["loss"] for line in steps[:3]) / 3 == pytest.approx(epochs[0]["train_loss"])

    config = json.loads((run / "config.json").read_text())
    assert (config["frames"], config["mean"], config["keep_rate"], config["train_clips"]) == (64, -9.0, [0.5], 36)
    assert config["loss"] == "ce" and config["metric"] == "top1" and config["versions"]["torch"] == torch.__version__

    # The best epoch at the target keep-rate, even if an earlier epoch has a better metric.
    result = json.loads((run / "result.json").read_text())
    finals = [line for line in epochs if line["keep_rate"] == [0.5, 0.5]]
    best = max(finals, key=lambda line: line["top1"])
    assert result["best_epoch"] == best["epoch"] and result["val"]["top1"] == best["top1"] > 0.6
    model = load_pretrained(run)
    assert model.keep_rates == (0.5, 0.5) and model.extra["epoch"] == best["epoch"]
    assert model.labels == ["high", "low", "middle"] and not model.multilabel
    card = (run / "README.md").read_text(encoding="utf-8")
    assert f"epoch: {best['epoch']}, metric: top1, value: {best['top1']}" in card and "0.5 in block" in card
    features = data.FeatureExtractor(model.features)
    test = load_dataset("folder", "test", data_dir=clips, frames=64)
    metrics, failed = evaluate_model(model, features, make_loader(test, 5, train=False), "cpu", multilabel=False)
    assert not failed and metrics["top1"] == result["test"]["top1"]
    assert metrics["map"] == pytest.approx(result["test"]["map"])


def test_training_clips_decide_whether_the_task_is_multilabel(train, tagged, monkeypatch):
    """The metric does not depend on whether each clip of val and test happens to have one label."""
    asked, evaluate = [], engine.evaluate_predictions
    monkeypatch.setattr(engine, "evaluate_predictions", lambda *args: asked.append(args[2]) or evaluate(*args))
    run = train("run", *tagged, *train.plain, *train.short, "--mean", -9, "--std", 3)
    model = load_pretrained(run)
    result = json.loads((run / "result.json").read_text())
    assert model.multilabel and result["metric"] == "map"
    features = data.FeatureExtractor(model.features)
    for split in ("val", "test"):
        manifest = tagged[tagged.index(f"--{split}-manifest") + 1]
        loader = make_loader(load_dataset("manifest", split, manifest=manifest, frames=64), 5, train=False)
        by_sigmoid = evaluate_model(model, features, loader, "cpu", multilabel=True)[0]["map"]
        assert result[split]["map"] == pytest.approx(by_sigmoid)
    assert asked == [True] * 3  # both epochs, and test


def test_pruning_flag_reaches_the_augmentation(train, monkeypatch):
    seen = []
    for name in ("features", "patches"):
        original = getattr(Augment, name)

        def record(self, x, *rest, name=name, original=original):
            seen.append((name, rest[-1]))
            return original(self, x, *rest)

        monkeypatch.setattr(Augment, name, record)
    train("pruned", "--epochs", 2, "--shrink-start", 1, "--shrink-epochs", 0)
    assert seen == [("features", False), ("patches", False)] * 3 + [("features", True), ("patches", True)] * 3
    seen.clear()
    train("whole", "--epochs", 2, "--keep-rate", 1)
    assert {flag for _, flag in seen} == {False}


def test_accumulation_equals_a_larger_batch(train, plain):
    parts = train("parts", *train.plain, "--accumulate", 3)
    for left, right in zip(train.log(plain, "step"), train.log(parts, "step"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5) and left["lr"] == right["lr"]
    with pytest.raises(UserError, match="--batch-size 12 cannot be split evenly: 1 processes times --acc.* 5 "):
        train("odd", "--accumulate", 5)
    with pytest.raises(UserError, match="36 training clips do not fill one batch: use a --batch-size of at most 36"):
        train("huge", "--batch-size", 48)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_follows_full(train, plain, amp):
    half = train("half", *train.plain, "--amp", amp)
    losses = [[line["train_loss"] for line in train.log(run, "epoch")] for run in (plain, half)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert all(value.dtype == torch.float32 for value in train.state(half)["model"].values())
    assert bool(train.state(half)["scaler"]) == (amp == "fp16")


def test_loss_that_is_not_finite_is_explained(train, monkeypatch):
    original = Trainer.loss

    def loss(self, batch):
        return original(self, batch) * (float("nan") if self.global_step == 4 else 1.0)

    monkeypatch.setattr(Trainer, "loss", loss)
    position = r"not finite in step 4 \(epoch 1, step 1 of 3\).*lr 0\.000.*keep-rate \[1\.0, 1\.0\]"
    with pytest.raises(UserError, match=position + r".*\d\d\.wav.*last\.pt.*Try.*--clip-grad"):
        train("run")
    assert train.state(train.root / "run")["progress"]["epoch"] == 1
    assert torch.isfinite(train.state(train.root / "run")["model"]["head.weight"]).all()


def test_diverging_run_stops(train):
    with pytest.raises(UserError, match="the loss is not finite"):
        train("run", "--lr", 1e30, "--warmup-epochs", 0)


def test_overflowing_fp16_gradients_only_skip_steps(train, monkeypatch):
    original = Trainer.loss

    def loss(self, batch):
        # The loss of the first step is finite, but its scaled gradient is not.
        return original(self, batch) * (1e35 if self.global_step == 0 else 1.0)

    monkeypatch.setattr(Trainer, "loss", loss)
    run = train("run", "--amp", "fp16", *train.short)
    assert train.state(run)["scaler"]["scale"] == 2.0**15


@pytest.mark.skipif(sys.platform != "linux", reason="needs /sys and file size limits")
def test_output_that_cannot_be_written(train, clips):
    with pytest.raises(UserError, match="--output /sys/pruneattn: cannot be created"):
        train("run", "--output", "/sys/pruneattn")
    (train.root / "file").write_text("")
    with pytest.raises(UserError, match="file: a file of this name exists"):
        train("file")


@pytest.mark.skipif(sys.platform != "linux", reason="needs file size limits")
def test_full_disk_keeps_the_previous_checkpoint(train, whole, monkeypatch):
    original = Trainer.finish_epoch

    def finish_epoch(self, epoch):
        if epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # no file can grow beyond this
        return original(self, epoch)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(Trainer, "finish_epoch", finish_epoch)
    try:
        with pytest.raises(UserError, match=r"cannot write .*(last\.pt|best\.safetensors)"):
            train("full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    full = train.root / "full"
    assert train.state(full)["progress"]["epoch"] == 2 and not list(full.glob(".*.tmp"))
    train("full", "--resume")
    train.assert_same(whole, full)


@pytest.mark.parametrize("cache", ["--cache", "--no-cache"])
def test_wrong_test_split_is_rejected_at_the_start(train, tagged, clips, tmp_path, monkeypatch, cache):
    """Before any clip is decoded and before the output folder exists, so that the corrected command runs."""
    monkeypatch.setattr(ClipDataset, "read", None)
    with pytest.raises(UserError, match="nothing.json"):
        train("run", *tagged, "--test-manifest", tmp_path / "nothing.json", cache)
    (tmp_path / "clips").mkdir()
    for split in ("train", "val"):
        (tmp_path / "clips" / split).symlink_to(clips / split)
    with pytest.raises(UserError, match="has train/ but no test/"):
        train("run", "--data-dir", tmp_path / "clips", cache)
    assert not (train.root / "run").exists()


@pytest.mark.parametrize("wrong", ["--mixup 2", "--mask-1d 0.5", "--drop-path 1"])
def test_rejected_options_create_no_run(train, wrong):
    with pytest.raises(UserError, match="mixup|mask_1d|drop_path"):
        train("run", *wrong.split())
    train("run", "--epochs", 1, "--keep-rate", 1)


def test_damaged_clips_are_listed_and_skipped(train, clips, tmp_path, capsys):
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    kind = sorted(path.name for path in (folder / "train").iterdir())[0]
    (folder / "train" / kind / "00.wav").write_text("no sound")
    (folder / "val" / kind / "01.wav").write_bytes(b"")
    run = train("run", "--data-dir", folder, *train.short)
    lines = (run / "failed_clips.txt").read_text().splitlines()
    assert [str(folder / part / kind / name) for part, name in (("train", "00.wav"), ("val", "01.wav"))] == [
        line.partition(": ")[0] for line in lines
    ]
    message = f"2 clips could not be decoded and are skipped; they are listed in {run / 'failed_clips.txt'}"
    assert capsys.readouterr().out.count(message) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="file names are not bytes there")
def test_names_that_are_not_utf8(train, clips, tmp_path):
    folder = tmp_path / "clips"
    for part in ("train", "val", "test"):  # all in one folder, so that the hash of the name decides
        for path in (clips / part).rglob("*.wav"):
            copy = folder / path.parent.name / os.fsdecode(f"{part}{path.stem}\xe9.wav".encode("latin-1"))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"" if path.stem == "00" else path.read_bytes())
    run = train("run", "--data-dir", folder, *train.short)
    lines = (run / "failed_clips.txt").read_text().splitlines()
    assert len(lines) == len({*lines}) and all("\\udce9.wav: " in line for line in lines)


def test_seeds_of_adjacent_positions_differ():
    draws = set()
    for place in [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, -1)]:
        seed_step(*place)
        draws.add(torch.rand(1).item())
    assert len(draws) == 6
    seed_step(0, 1, 0, 0)
    assert torch.rand(1).item() in draws
