import json
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import pruneattn
from pruneattn.checkpoints import pretrained
from pruneattn.data.fbank import FeatureConfig
from pruneattn.errors import UserError
from pruneattn.models import create_model
from pruneattn.models.description import Description

LABELS = ["dog", "näher", "rain, heavy"]
FEATURES = FeatureConfig(frames=128, mean=-6.85, std=5.57, padding="zero")


def make(name="audiomae_tiny", **arguments):
    defaults = {"embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 3, "prune_blocks": (1, 3), "frames": 128}
    model = create_model(name, **defaults | arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(model, path, **changes):
    arguments = {"features": FEATURES, "labels": LABELS, "multilabel": False}
    pruneattn.save_pretrained(model, path, **arguments | changes)


@pytest.mark.parametrize("name", ["audiomae_tiny", "ast_tiny"])
@pytest.mark.parametrize("keep_rate", [0.5, (0.7, 0.4)])
def test_round_trip_is_bit_equal(tmp_path, name, keep_rate):
    model = make(name, keep_rate=keep_rate, score="intensity", drop_path=0.1)
    extra = {"metric": "top1", "value": 97.25, "epoch": 3}
    save(model, tmp_path / "best.safetensors", multilabel=True, extra=extra)
    loaded = pruneattn.load_pretrained(tmp_path / "best.safetensors")
    assert type(loaded) is type(model) and loaded.config == model.config and loaded.keep_rates == model.keep_rates
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert (loaded.features, loaded.labels, loaded.multilabel, loaded.extra) == (FEATURES, LABELS, True, extra)
    assert not loaded.training
    x = torch.randn(2, 128, 128)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))


@pytest.mark.parametrize(("stride", "version"), [(16, 1), ((16, 16), 1), (10, 2), ((10, 16), 2)])
def test_other_strides_have_their_own_format_version(tmp_path, stride, version):
    """Earlier versions of pruneattn read version 1 and reject others by name."""
    path = tmp_path / "x.safetensors"
    model = make("ast_tiny", stride=stride, frames=100, keep_rate=0.5)
    save(model, path, features=replace(FEATURES, frames=100))
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["pruneattn"])
    assert (content["format_version"], "stride" in content["model"]) == (version, version == 2)
    loaded = pruneattn.load_pretrained(path)
    assert loaded.config == model.config and loaded.stride == model.stride
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    other = create_model(**model.config)
    report = pruneattn.load_checkpoint(other, path)
    assert report.notes == [] and torch.equal(other.pos_embed, model.pos_embed)


def test_positions_are_resampled_on_request_only(tmp_path):
    path = tmp_path / "x.safetensors"
    model = make("ast_tiny", stride=10, keep_rate=0.5)
    save(model, path)
    with pytest.warns(UserWarning, match=r"12 x 12 positions resampled to 8 x 8 of stride 16") as caught:
        other = pruneattn.load_pretrained(path, stride=16)
    assert caught[0].filename == __file__ and len(caught) == 1
    assert other.stride == (16, 16) and other.config | {"stride": [10, 10]} == model.config and not other.training
    assert other.description == Description(FEATURES, LABELS, False)
    fitted = make("ast_tiny")
    with pytest.warns(UserWarning, match="resampled"):
        pruneattn.load_checkpoint(fitted, path)
    assert torch.equal(fitted.pos_embed, other.pos_embed) and torch.equal(other.norm.weight, model.norm.weight)
    save(make(), path)
    with pytest.raises(UserError, match="stride: audiomae_tiny has a patch every 16 mel bins"):
        pruneattn.load_pretrained(path, stride=10)
    assert pruneattn.load_pretrained(path, stride=16).stride == (16, 16)
    with pytest.raises(UserError, match="^stride: expected a whole number from 1 to 16"):
        pruneattn.load_pretrained(path, stride=0)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_saved_model_takes_no_statistics(tmp_path, name):
    save(make(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"{name} \(--{name}\) applies only with model"):
        pruneattn.load_pretrained(tmp_path / "x.safetensors", **{name: 1.0})


def test_a_folder_prefers_the_best_file(tmp_path):
    model = make()
    save(make(), tmp_path / "model.safetensors", extra={"which": "model"})
    assert pruneattn.load_pretrained(str(tmp_path)).extra == {"which": "model"}
    save(model, tmp_path / "best.safetensors")
    assert pruneattn.load_pretrained(tmp_path).extra == {}


def test_contents_of_the_file(tmp_path):
    save(make(), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(make().state_dict())
    content = json.loads(metadata["pruneattn"])
    assert metadata["format"] == "pt" and content["format_version"] == 1
    assert content["pruneattn_version"] == pruneattn.__version__
    assert content["model"]["name"] == "audiomae_tiny" and content["labels"] == LABELS


def test_a_folder_holds_a_card_and_a_copy_of_the_configuration(tmp_path):
    folder = tmp_path / "new" / "model"
    model = make(keep_rate=0.5)
    save(model, folder, multilabel=True, extra={"metric": "top1", "value": 97.25})
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        content = json.loads(file.metadata()["pruneattn"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "load_pretrained reads the metadata" in config.pop("about") and config == content
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: pruneattn" in card and "multilabel (sigmoid)" in card and "value: 97.25" in card
    (folder / "config.json").write_text("{}")  # only the metadata matter
    assert pruneattn.load_pretrained(folder).config == model.config
    with pytest.raises(UserError, match="contains another kind of config.json"):
        save(model, folder)
    (folder / "config.json").unlink()
    (folder / "README.md").write_text("# Mine\n")
    other = make(keep_rate=0.25)
    save(other, str(folder))
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert pruneattn.load_pretrained(folder).keep_rates == other.keep_rates


def test_a_loaded_model_is_saved_with_its_own_description(tmp_path):
    """Except ``extra``, which describes the loaded weights: it is saved only if given."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save(make(), first, multilabel=True, extra={"top1": 0.5})
    model = pruneattn.load_pretrained(first)
    assert model.description == Description(FEATURES, LABELS, True, {"top1": 0.5})
    pruneattn.save_pretrained(model, second, extra=model.extra)
    again = pruneattn.load_pretrained(second)
    assert again.description == model.description and again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    pruneattn.save_pretrained(model, second, multilabel=False, labels=("a", "b", "c"))
    assert pruneattn.load_pretrained(second).description == Description(FEATURES, ["a", "b", "c"], False, {})
    assert model.description == Description(FEATURES, LABELS, True, {"top1": 0.5})


@pytest.mark.parametrize("name", ["features", "labels", "multilabel"])
def test_a_model_without_a_description(tmp_path, name):
    model, path = make(), tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="save_pretrained: the model has no features, labels, multilabel; pass them"):
        pruneattn.save_pretrained(model, path)
    with pytest.raises(UserError, match=f"save_pretrained: the model has no {name}; pass them"):
        save(model, path, **{name: None})
    assert os.listdir(tmp_path) == []
    setattr(model, name, {"features": FEATURES, "labels": LABELS, "multilabel": False}[name])
    save(model, path, **{name: None})
    assert pruneattn.load_pretrained(path).description == Description(FEATURES, LABELS, False, {})


def test_paths_that_are_folders(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    save(make(), tmp_path / "folder.safetensors")
    save(make(), tmp_path / "run.v2")
    save(make(), tmp_path / "file.safetensors")
    assert (tmp_path / "folder.safetensors" / "model.safetensors").is_file()
    assert (tmp_path / "run.v2" / "README.md").is_file() and (tmp_path / "file.safetensors").is_file()


def test_load_checkpoint_reads_it_too(tmp_path):
    model = make("ast_tiny")
    save(model, tmp_path / "best.safetensors")
    other = make("ast_tiny", num_classes=9)
    report = pruneattn.load_checkpoint(other, tmp_path)
    assert report.format == "AST, pruneattn" and torch.equal(other.norm.weight, model.norm.weight)
    assert other.head.out_features == 9 and "keeps its initial values" in report.notes[0]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "best.safetensors"
    save(make(), path, extra={"epoch": 1})
    before = path.read_bytes()

    def full_disk(state, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    failed = pytest.raises(UserError, match="cannot write .*No space left on device.*is unchanged")
    with mock.patch.object(pretrained, "save_file", full_disk), failed:
        save(make(), path, extra={"epoch": 2})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["best.safetensors"]


def test_models_that_cannot_be_saved(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="labels: expected 3 names, one per class of the model, got 2"):
        save(make(), path, labels=["a", "b"])
    with pytest.raises(ValueError, match="features: expected 1024 frames, as the model has, got 128"):
        save(make(frames=1024), path)
    for value in (float("nan"), torch.ones(1)):
        with pytest.raises(ValueError, match="plain finite values that JSON can hold"):
            save(make(), path, extra={"value": value})
    with pytest.raises(UserError, match="score: .*no plain configuration"):
        save(make(score=lambda q, k, v, extra_tokens: k.mean((1, 3))[:, extra_tokens:]), path)
    with pytest.raises(UserError, match="absent"):
        save(make(), tmp_path / "absent" / "x.safetensors")
    assert os.listdir(tmp_path) == []


def rewritten(path, change):
    """Save the file at `path` again with its configuration changed by `change`."""
    save(make(), path)
    with safe_open(path, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        content = json.loads(file.metadata()["pruneattn"])
    content = change(content, state)
    save_file(state, path, metadata={"pruneattn": content if isinstance(content, str) else json.dumps(content)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content, state: content | {"format_version": 4},
            "format version 4 by pruneattn 0.*reads versions 1, 2, 3",
        ),
        (lambda content, state: "{", "configuration is not readable"),
        (lambda content, state: [1], "configuration is not readable"),
        (lambda content, state: content | {"model": content["model"] | {"depth": 5}}, "do not match.*blocks.4"),
        (lambda content, state: content | {"model": content["model"] | {"name": "vit"}}, "do not match.*'vit'"),
        (lambda content, state: content | {"model": {"size": 3}}, "do not match"),
        (lambda content, state: {"format_version": 1}, "do not match"),
        (lambda content, state: state.pop("head.bias") is None or content, "do not match.*head.bias"),
    ],
)
def test_files_whose_weights_and_configuration_do_not_match(tmp_path, change, message):
    path = tmp_path / "x.safetensors"
    rewritten(path, change)
    with pytest.raises(UserError, match=message) as error:
        pruneattn.load_pretrained(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_foreign_and_bad_files(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "last.pt")
    for name in ("x.safetensors", "last.pt"):
        with pytest.raises(UserError, match=f"{name}: not a model that pruneattn saved.*use load_checkpoint"):
            pruneattn.load_pretrained(tmp_path / name)
    with pytest.raises(UserError, match="holds no best.safetensors, model.safetensors or pytorch_model.bin"):
        pruneattn.load_pretrained(tmp_path)
    with pytest.raises(UserError, match="no such checkpoint"):
        pruneattn.load_pretrained(tmp_path / "absent")
    save(make(), tmp_path / "best.safetensors")
    data = (tmp_path / "best.safetensors").read_bytes()
    (tmp_path / "best.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not readable as safetensors.*truncated or damaged"):
        pruneattn.load_pretrained(tmp_path)
