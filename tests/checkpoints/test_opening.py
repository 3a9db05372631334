"""Any checkpoint opened as a model with features and labels, with the arguments that commands and callers pass."""

import subprocess
import sys

import pytest
import soundfile
import torch

import pruneattn
from pruneattn import checkpoints
from pruneattn.checkpoints.opening import (
    class_names,
    describe,
    fingerprint,
    open_checkpoint,
    open_dataset,
    reconfigured,
)
from pruneattn.data.fbank import FeatureConfig
from pruneattn.errors import UserError
from pruneattn.models import create_model
from pruneattn.models.description import Description

FEATURES = FeatureConfig(frames=128, mean=-4.25, std=4.5, padding="zero")
LABELS = ["dog", "cat", "rain"]


def make(name="ast_tiny", **arguments):
    defaults = {"embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 3, "prune_blocks": (1,), "frames": 128}
    return create_model(name, **defaults | arguments).eval()


@pytest.fixture
def saved(tmp_path):
    model = make(keep_rate=0.5)
    pruneattn.save_pretrained(model, tmp_path / "own", features=FEATURES, labels=LABELS, multilabel=True)
    return tmp_path / "own"


def test_public_surface():
    for name in checkpoints.__all__:
        assert getattr(checkpoints, name).__name__ == name
    for name in ("load_checkpoint", "save_checkpoint", "load_pretrained", "save_pretrained"):
        assert getattr(pruneattn, name) is getattr(checkpoints, name)


@pytest.mark.slow  # starts a process
def test_importing_the_package_imports_no_checkpoints():
    code = "import sys, pruneattn; print([name for name in sys.modules if name.startswith('pruneattn.ch')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_a_checkpoint_of_this_package(saved):
    model = open_checkpoint(saved)
    assert model.description == Description(FEATURES, LABELS, True) and not model.training
    assert (model.score, model.keep_rates) == ("cls", (0.5,))
    assert describe(model) == "ast_tiny, 128 frames (64 patches), 3 classes"


def test_the_description_has_a_stride_other_than_16(tmp_path):
    for stride, text in ((16, ""), (10, "stride 10, "), ((10, 16), "stride 10,16, ")):
        model = make(stride=stride)
        assert describe(model) == f"ast_tiny, {text}128 frames ({model.num_patches} patches), 3 classes"
    pruneattn.save_pretrained(model, tmp_path, features=FEATURES, labels=LABELS, multilabel=True)
    assert open_checkpoint(tmp_path).stride == (10, 16)
    with pytest.warns(UserWarning, match="12 x 8 positions resampled to 8 x 8"):
        assert open_checkpoint(tmp_path, stride=16, score="column_mean").stride == (16, 16)


@pytest.mark.parametrize(
    ("name", "value"), [("num_classes", 3), ("frames", 128), ("mean", 0.0), ("std", 1.0), ("padding", "zero")]
)
def test_arguments_that_apply_only_with_model(saved, name, value):
    message = rf"{name} \(--{name.replace('_', '-')}\) applies only with model \(--model\)"
    with pytest.raises(UserError, match=message):
        open_checkpoint(saved, **{name: value})


def test_another_score(saved):
    model = open_checkpoint(saved, score="column_mean")
    assert (model.score, model.keep_rates, model.labels) == ("column_mean", (0.5,), LABELS)
    original = open_checkpoint(saved)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


@pytest.fixture
def foreign(tmp_path):
    """Weights without a configuration, all zero."""
    model = create_model("audiomae_tiny", num_classes=35, frames=128)
    torch.save({name: torch.zeros_like(value) for name, value in model.state_dict().items()}, tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


def test_a_checkpoint_of_another_project(foreign):
    model = open_checkpoint(foreign, model="audiomae_tiny", dataset="spc2")
    info = pruneattn.data.DATASETS["spc2"]
    assert model.description == Description(
        FeatureConfig(128, info.mean, info.std, "zero"), None, bool(info.multilabel)
    )
    assert (model.num_classes, model.frames, model.training) == (info.num_classes, info.frames, False)
    assert not any(parameter.any() for parameter in model.head.parameters())
    options = {"num_classes": 35, "frames": 128, "mean": -1.0, "std": 2.0, "padding": "min"}
    model = open_checkpoint(foreign, model="audiomae_tiny", dataset="as20k", **options)
    assert model.description == Description(FeatureConfig(128, -1.0, 2.0, "min"), None, True)


def test_a_foreign_checkpoint_keeps_its_stride(tmp_path):
    """12 x 24 patches of stride 10, or 8 x 36 of stride 16."""
    source = create_model("ast_tiny", num_classes=3, frames=250, stride=10)
    path = tmp_path / "theirs.pth"
    pruneattn.save_checkpoint(source, path, format="ast")

    def opened(**arguments):
        return open_checkpoint(path, model="ast_tiny", num_classes=3, **arguments)

    model = opened(frames=250)
    assert (model.stride, model.frames) == ((10, 10), 250) and torch.equal(model.pos_embed, source.pos_embed)
    with pytest.warns(UserWarning, match="12 x 24 positions resampled to 8 x 15"):
        assert opened(frames=250, stride=16).stride == (16, 16)
    with pytest.raises(UserError, match="theirs.pth: position table: 288 patches are 12 x 24 .* 8 x 36 "):
        opened(frames=400)
    with pytest.warns(UserWarning, match="24 time columns interpolated to 39"):
        assert opened(frames=400, stride=10).stride == (10, 10)
    for stride in (None, 10, 16):
        with pytest.raises(UserError, match="AST, official, which does not fit the model audiomae_tiny"):
            open_checkpoint(path, model="audiomae_tiny", num_classes=3, stride=stride)


def test_audiomae_has_one_stride(foreign):
    assert open_checkpoint(foreign, model="audiomae_tiny", dataset="spc2", stride=16).stride == (16, 16)
    with pytest.raises(UserError, match="stride: audiomae_tiny has a patch every 16 mel bins and frames"):
        open_checkpoint(foreign, model="audiomae_tiny", dataset="spc2", stride=10)


def test_a_checkpoint_of_another_project_needs_its_classes(foreign):
    message = r"the dataset manifest does not determine the number of classes; pass num_classes \(--num-classes\)"
    with pytest.raises(UserError, match=message):
        open_checkpoint(foreign, model="audiomae_tiny", dataset="manifest")
    with pytest.raises(UserError, match="lacks head.*35 classes in the file and 527 in the model"):
        open_checkpoint(foreign, model="audiomae_tiny", dataset="as20k")


def test_class_names(tmp_path):
    model = make()
    assert class_names(model, None) is None
    model.labels = LABELS
    assert class_names(model, None) == LABELS
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/0,a\n1,/m/1,b\n2,/m/2,c\n")
    assert class_names(model, tmp_path / "labels.csv") == ["a", "b", "c"]
    with pytest.raises(UserError, match="labels.csv names 3 classes, the checkpoint has 4"):
        class_names(make(num_classes=4), tmp_path / "labels.csv")


def test_a_reconfigured_model_is_a_copy():
    model = make(keep_rate=0.5)
    model.description = Description(FEATURES, LABELS, False)
    other = reconfigured(model, prune_blocks=(0, 2), keep_rate=0.25)
    assert (other.prune_blocks, other.keep_rates, other.score) == ((0, 2), (0.25, 0.25), "cls")
    assert other.description == model.description
    other.labels = ["a", "b", "c"]
    other.head.weight.data.zero_()
    assert model.labels == LABELS and model.head.weight.any() and model.prune_blocks == (1,)


@pytest.fixture
def clips(tmp_path):
    """A folder with one clip in each of three classes."""
    for label in LABELS:
        for split in ("train", "test"):
            (tmp_path / "clips" / split / label).mkdir(parents=True)
        soundfile.write(tmp_path / "clips" / "test" / label / "1.wav", torch.randn(16000).numpy() / 10, 16000)
    return tmp_path / "clips"


def test_a_dataset_for_a_checkpoint(clips):
    model = make()
    opened = open_dataset(model, "best", "folder", data_dir=clips)
    assert len(opened) == 3 and opened.labels == sorted(LABELS)
    assert (model.labels, model.multilabel) == (sorted(LABELS), False)
    with pytest.raises(UserError, match="no clips for split train"):
        open_dataset(model, "best", "folder", "train", data_dir=clips)
    model.labels = ["cat", "cow", "rain"]
    with pytest.raises(
        UserError, match="best and the dataset folder .*: class 1 is 'cow' in the checkpoint and 'dog' in"
    ):
        open_dataset(model, "best", "folder", data_dir=clips)
    with pytest.raises(UserError, match="best and the dataset toy .*: the checkpoint has 3 classes, the dataset 10"):
        open_dataset(model, "best", "toy")


def test_the_fingerprint_does_not_change():
    """Label files of older versions hold it, so its value for a given model must never change."""
    model = make(embed_dim=8, depth=2, num_heads=2, num_classes=2, frames=32, keep_rate=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 64)
    with pytest.raises(ValueError, match="no features"):
        fingerprint(model)
    model.description = Description(FeatureConfig(32, -4.25, 4.5, "zero"), ["a", "ä"], True)
    expected = "8d1faa8f494b63913820d496570c3a7818c1c0a602bfc8c1e09f3f24f53f2b17"
    assert fingerprint(model) == expected
    model.set_keep_rate(0.7)
    assert fingerprint(model) == expected
    model.labels = ["a", "b"]
    assert fingerprint(model) != expected
