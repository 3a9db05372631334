"""``pruneattn convert``: any checkpoint as input. The input is never changed."""

import json
import os
import shutil

import pytest
import torch

import pruneattn
from pruneattn.convert import main
from pruneattn.data.fbank import FeatureConfig
from pruneattn.errors import UserError
from pruneattn.models import create_model

FEATURES = FeatureConfig(frames=128, mean=-6.85, std=5.57, padding="zero")
LABELS = ["dog", "näher", "rain, heavy"]


def make(family, **size):
    torch.manual_seed(0)
    size = size or {"embed_dim": 48, "depth": 3, "num_heads": 3, "prune_blocks": (1, 2)}
    return create_model(f"{family}_tiny", num_classes=3, frames=128, keep_rate=0.5, **size)


def save(model, path):
    pruneattn.save_pretrained(model, path, features=FEATURES, labels=LABELS, multilabel=True)


def convert(*arguments):
    main([str(argument) for argument in arguments])


def assert_same(path, expected):
    model = make(expected.name.partition("_")[0])
    pruneattn.load_checkpoint(model, path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize(
    ("family", "format_"), [("ast", "ast"), ("ast", "huggingface"), ("audiomae", "audiomae"), ("audiomae", "timm")]
)
def test_checkpoints_of_this_package(tmp_path, capsys, family, format_):
    model = make(family)
    save(model, tmp_path / "best.safetensors")
    convert(tmp_path, tmp_path / "out", "--format", format_)
    assert_same(tmp_path / "out", model)
    assert f"out: {family}_tiny, 128 frames (64 patches), 3 classes, as {format_}" in capsys.readouterr().out
    if format_ == "huggingface":
        opened = pruneattn.load_pretrained(tmp_path / "out")
        assert (opened.features, opened.labels, opened.multilabel) == (FEATURES, LABELS, True)


def test_from_one_project_to_another(tmp_path):
    """The official AST to Hugging Face and back, described by options."""
    model = make("ast", depth=12)  # the size that --model names
    pruneattn.save_checkpoint(model, tmp_path / "official.pth", format="ast")
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/0,dog\n1,/m/1,cat\n2,/m/2,rain\n")
    convert(
        tmp_path / "official.pth",
        tmp_path / "hf",
        "--format",
        "huggingface",
        "--model",
        "ast_tiny",
        "--num-classes",
        3,
        "--frames",
        128,
        "--mean",
        -6.85,
        "--std",
        5.57,
        "--label-csv",
        tmp_path / "labels.csv",
        "--dataset",
        "spc2",
    )
    opened = pruneattn.load_pretrained(tmp_path / "hf")
    assert (opened.features, opened.labels) == (FEATURES, ["dog", "cat", "rain"])
    convert(tmp_path / "hf", tmp_path / "again.pth", "--format", "ast")
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("official.pth", "again.pth"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_input_is_never_overwritten(tmp_path):
    run, weights = tmp_path / "run", tmp_path / "run" / "model.safetensors"
    save(make("ast"), run)
    (run / "last.pt").write_bytes(b"a run's state")
    (tmp_path / "link.pth").symlink_to(weights)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(weights)
    os.link(weights, tmp_path / "hard.pth")
    shutil.copytree(run, tmp_path / "copy")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cases = [
        (run, run, "huggingface"),
        (weights, run, "huggingface"),
        (weights, weights, "ast"),
        (run, weights, "ast"),
        (run, run / "last.pt", "ast"),
        (run, tmp_path / "link.pth", "ast"),
        (weights, tmp_path / "hard.pth", "ast"),
        (run, tmp_path / "linked", "huggingface"),
        (run, run / ".." / "run", "huggingface"),
    ]
    for checkpoint, output, format_ in cases:
        with pytest.raises(UserError, match="is part of the checkpoint .*choose another path"):
            convert(checkpoint, output, "--format", format_)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    convert(run, run / "new.pth", "--format", "ast")
    convert(weights, tmp_path / "hf", "--format", "huggingface")
    convert(weights, tmp_path / "hf", "--format", "huggingface")  # over its own output
    assert json.loads((run / "config.json").read_text())["labels"] == LABELS


def test_errors_say_what_to_do(tmp_path):
    save(make("audiomae"), tmp_path / "best.safetensors")
    with pytest.raises(UserError, match="'ast' cannot hold the weights of audiomae_tiny; use 'audiomae' or"):
        convert(tmp_path, tmp_path / "out", "--format", "ast")
    with pytest.raises(UserError, match="absent: no such checkpoint"):
        convert(tmp_path / "absent", tmp_path / "out", "--format", "ast")
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/0,dog\n")
    with pytest.raises(UserError, match="names 1 classes, the checkpoint has 3"):
        convert(tmp_path, tmp_path / "out", "--format", "timm", "--label-csv", tmp_path / "labels.csv")
    with pytest.raises(UserError, match="--mean.* to checkpoints of other projects"):
        convert(tmp_path, tmp_path / "out", "--format", "timm", "--mean", 1)
    foreign = (tmp_path / "best.safetensors", tmp_path / "out", "--format", "audiomae", "--model", "audiomae_tiny")
    with pytest.raises(UserError, match="unknown dataset 'nope': choose one of as20k"):
        convert(*foreign, "--dataset", "nope")
    for option in ("--frames", "--num-classes"):
        with pytest.raises(UserError, match=f"{option[2:].replace('-', '_')}: must be a whole number above 0, got 0"):
            convert(*foreign, option, 0)
    assert sorted(os.listdir(tmp_path)) == ["best.safetensors", "labels.csv"]
